"""Networks in and out: the rewritten architecture of a plan, and networks that are read from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import rewriter
from quantfix._inputs import dataset_of
from quantfix._result import Point
from rewriter import Plan, profile, trace
from rewriter.assemble import rewritten
from rewriter.export import trainable
from rewriter.graph import facts
from search.data.datasets import Inputs, batches

GUESSED = (3, 224, 224)  # what a network reads that does not say it
BATCH, MOST = 32, 256


def rewrite(
    model: nn.Module,
    plan: str | Plan | Point,
    calibration: Any = None,
    *,
    keep_batch_norm: bool = False,
    target: str = "onnxruntime",
) -> fx.GraphModule:
    """The architecture that a plan makes of a network, as a module that can be trained.

    Modules and parameters have the same names each time; with ``keep_batch_norm`` the trained weights go back by
    ``Result.export(weights=...)`` or ``quantfix export DIR --pick PLAN --weights FILE``.

    Args:
        model: The float network; it is copied and never touched.
        plan: What to do; nothing gives the network itself in the form that plans are about.
        calibration: Inputs, as for `optimize`: approximate rules are fitted on them, and batch norms take their statistics.
            None: the network is traced with what it says of its input, else an image of 224 pixels; nothing is fitted.
        keep_batch_norm: Whether convolutions get back the batch norms that were folded, which at first change nothing.
        target: The int8 profile; some rules ask it what they may do.

    Raises:
        TraceError: the network cannot be traced.
        PlanError: the plan does not apply to it.
    """
    steps = plan if isinstance(plan, Plan) else Plan.parse(str(plan))
    scheme = rewriter.target(target)
    if calibration is None:
        gm = trace(model, _noise(model))
        facts.SCHEME.put(gm, scheme)
        made = rewriter.rewrite(gm, steps) if steps.steps else gm
        return trainable(made, batch_norm=keep_batch_norm)
    given: Any = dataset_of(calibration, "calibration")
    samples = Inputs(given) if isinstance(given[0], tuple | list) else given
    inputs = list(batches(samples, BATCH))[: MOST // BATCH]
    gm = trace(model, inputs[0][:2])
    facts.SCHEME.put(gm, scheme)
    profile(gm, inputs)
    made = rewritten(gm, steps, scheme, inputs)
    return trainable(made, inputs, batch_norm=keep_batch_norm)


def load_onnx(path: str | Path, shape: Sequence[int] | None = None) -> nn.Module:
    """The float network in an ONNX file, as an ``nn.Module`` whose batch is free.

    Args:
        path: The file.
        shape: Of an input without its batch, such as (3, 224, 224), where the file leaves it open.

    Raises:
        TraceError: it holds an operator that is not known, or is no float network.
    """
    from rewriter.onnx_import import import_onnx

    return import_onnx(Path(path), shape)


def load_tflite(path: str | Path) -> nn.Module:
    """The float network in a TensorFlow Lite file, as an ``nn.Module`` with channels first whose batch is free.

    Raises:
        TraceError: it holds an operator that is not known, or is no float network; or LiteRT is not installed.
    """
    from rewriter.tflite_import import import_tflite

    return import_tflite(Path(path))


def _noise(model: nn.Module) -> Tensor:
    """Two inputs of the shape that a network of timm says, else of an image of 224 pixels."""
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    shape = tuple(known.get("input_size") or GUESSED)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
