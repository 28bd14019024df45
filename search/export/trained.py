"""A plan's architecture for training in the user's own loop, and its trained weights taken back into a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, fx

from rewriter import Plan
from rewriter.assemble import Assembled, rewritten
from rewriter.export import retrained, trainable
from rewriter.storage import Digest
from search.config.schema import ConfigError
from search.job import Job
from search.run_dir.scores import Records
from search.scoring.evaluator import RewriteEvaluator

Weights = str | Path | Mapping[str, Any]


def architecture(job: Job, plan: str, keep_batch_norm: bool = True) -> fx.GraphModule:
    """The rewritten float network of a plan, trainable.

    Args:
        job: The run.
        plan: Its steps.
        keep_batch_norm: Whether convolutions get back the batch norms that were folded.

    Raises:
        RewriteError: the plan cannot be carried out.
    """
    own = job.evaluator
    gm = _rewritten(own, Plan.parse(plan))
    return trainable(gm, own.calibration, batch_norm=keep_batch_norm)


def with_weights(job: Job, plan: str, weights: Weights) -> Job:
    """The same run, but with trained weights for one plan; scores of it are kept apart.

    Args:
        job: The run.
        plan: Steps of the plan whose `architecture` was trained.
        weights: A safetensors file, or a state dict.

    Raises:
        ConfigError: the file cannot be read.
        RewriteError: the weights are not those of this plan.
    """
    own, wanted = job.evaluator, Plan.parse(plan)
    state = _state(weights)
    made = Assembled(retrained(_rewritten(own, wanted), state, own.scheme, own.calibration), ())
    digest = Digest()
    digest.add(state)

    def maker(asked: Plan) -> Assembled:
        assert asked == wanted
        return made

    own.baseline()  # before another maker takes the place of the network as it is
    records = Records(job.folder, f"{job.records.fingerprint}-weights-{digest.hex()[:16]}")
    return replace(job, evaluator=own.made_by(maker, records))


def _rewritten(own: RewriteEvaluator, plan: Plan) -> fx.GraphModule:
    return rewritten(own.gm, plan, own.scheme, own.calibration, own.store, own.seed, own.device)


def _state(weights: Weights) -> dict[str, Tensor]:
    if isinstance(weights, Mapping):
        state = dict(weights)
    else:
        try:
            state = safetensors.torch.load_file(str(weights))
        except (OSError, SafetensorError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(
                f"weights: {weights}: not readable as safetensors: {first}; write them by "
                "safetensors.torch.save_file(model.state_dict(), FILE)"
            ) from error
    odd = next((k for k, v in state.items() if not isinstance(v, Tensor)), None)
    if odd is not None:
        raise ConfigError(f"weights: {odd}: is no tensor: {type(state[odd]).__name__}")
    return {str(k): v.detach().cpu() for k, v in state.items()}
