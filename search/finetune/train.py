"""Training of a plan's whole network, end to end, with int8 simulated.

The closed forms and fits of the rules look at one layer at a time. Here all weights move together: towards the float network's
answers (distillation: unlabelled inputs suffice), or towards labels. A step changes each weight by at most ``rate`` times the root mean
square of its channel, so that one rate serves folded layers of any scale. The moving average of the weights is judged on inputs that
do not train; the best judged ones are kept, the untrained ones among them, so training never makes that judgement worse.

Everything a run of it needs is in a checkpoint that is replaced in one piece, and a batch depends on nothing but the seed and its
number: a killed run goes on where the last checkpoint was, and ends as if it had not been killed.
Source: Hinton et al., 2015 (arXiv:1503.02531); Esser et al., 2020 (arXiv:1902.08153) for the step sizes; Kingma and Ba, 2015
(arXiv:1412.6980); Shazeer and Stern, 2018 (arXiv:1804.04235) for steps relative to the weights; Loshchilov and Hutter, 2017
(arXiv:1608.03983) for the cosine schedule.
"""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rewriter.damage import fidelity_of
from rewriter.fitting import random_view
from rewriter.graph import channels_last
from rewriter.storage import replacing
from search.config.schema import ConfigError, FinetuneConfig
from search.data.evaluation_set import Tick
from search.finetune.data import Pool
from search.tasks import Task

log = logging.getLogger(__name__)

WARM_UP = 0.05  # share of the steps in which the rate rises
BETAS, EPS = (0.9, 0.99), 1e-10
MIN_CHANNEL_SCALE = 1e-2  # of a channel's scale relative to its tensor's
# what torch.load raises where a file is no checkpoint
DAMAGED = (
    pickle.UnpicklingError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    EOFError,
    AttributeError,
)
SMALLEST = 1e-3  # scale of biases that start at zero


@dataclass(frozen=True)
class Trained:
    """How a training went.

    Attributes:
        steps: Steps done.
        kept: The step whose averaged weights were kept; 0: the untrained ones.
        first: Loss before training, on the inputs that judge.
        best: Loss of what was kept.
    """

    steps: int
    kept: int
    first: float
    best: float


@dataclass
class _State:
    step: int = 0
    kept: int = 0
    stale: int = 0
    first: float = math.inf
    best: float = math.inf
    over: bool = False
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    average: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    chosen: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    mean: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    square: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass
class Training:
    """One network in training.

    Attributes:
        student: What is trained; its parameters that require a gradient.
        teacher: The float network.
        task: Gives the losses.
        pool: Inputs that train and that judge.
        options: The config's ``finetune`` section.
        device: Where torch runs; mixed precision on a GPU only.
        checkpoint: File of the state; None: nothing is kept.
    """

    student: fx.GraphModule
    teacher: fx.GraphModule
    task: Task
    pool: Pool
    options: FinetuneConfig
    device: str = "cpu"
    checkpoint: Path | None = None
    _answers: list[Any] = field(default_factory=list[Any], init=False)

    def __post_init__(self) -> None:
        self.teacher.to(self.device)

    def run(self, tick: Tick = lambda done, total: None) -> Trained:
        """Edit the student: train it, or go on training it; leaves the best weights in it.

        Raises:
            ConfigError: the data set fails, or the task has no such loss.
            OSError: the checkpoint cannot be written.
        """
        self.student.to(self.device)
        _prepare(self.student)
        parameters = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        start = {n: p.detach().clone() for n, p in parameters.items()}
        scales = {n: _scale(n, p) for n, p in start.items()}
        state = self._restored(start)
        _put(parameters, state.weights)
        steps, every = self.options.steps, self.options.check
        while not state.over:
            tick(state.step, steps)
            if not self._step(parameters, scales, state):
                log.warning(
                    "fine-tuning: the loss is not finite at step %d: finetune.rate: %g is too high for this network",
                    state.step,
                    self.options.rate,
                )
                state.over = True
            elif state.step % every == 0 or state.step == steps:
                self._judge(parameters, state)
                state.over = state.step == steps or state.stale >= self.options.patience
            if state.over or state.step % every == 0:
                state.weights = {n: p.detach().clone() for n, p in parameters.items()}
                self._store(state)
        tick(steps, steps)
        _put(parameters, state.chosen)
        log.info(
            "fine-tuning: loss %.4g -> %.4g in %d of %d steps",
            state.first,
            state.best,
            state.kept,
            state.step,
        )
        self.student.to("cpu")
        return Trained(state.step, state.kept, state.first, state.best)

    def loss(self, network: Callable[[Tensor], Any]) -> float:
        """Mean loss of a network on the inputs that judge."""
        total, count = 0.0, 0
        with torch.no_grad():
            for x, wanted in self._judges():
                with self._precision():
                    found = flat(network(x))
                total += float(self._loss(found, wanted)) * len(x)
                count += len(x)
        return total / count

    def _step(
        self, parameters: Mapping[str, nn.Parameter], scales: Mapping[str, Tensor], state: _State
    ) -> bool:
        """Edit parameters and state: one step; False where the loss is not finite."""
        random = np.random.default_rng([self.options.seed, state.step])
        x, labels = self.pool.batch(random, self.options.batch)
        if self.options.views == "mixed":
            x = _mixed(x, random)
        x = channels_last(x).to(self.device)
        wanted = labels
        if self.options.loss == "distillation":
            with torch.no_grad(), self._precision():
                wanted = flat(self.teacher(x))
        with torch.enable_grad():
            with self._precision():
                found = flat(self.student(x))
            loss = self._loss(found, wanted)
            if not bool(torch.isfinite(loss)):
                return False
            gradients: Any = torch.autograd.grad(
                loss, list(parameters.values()), allow_unused=True
            )
        state.step += 1
        rate = self.options.rate * _schedule(state.step, self.options.steps)
        decay = min(self.options.ema, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            for (name, p), g in zip(parameters.items(), gradients, strict=True):
                if g is not None:
                    _adam(p, g, state.mean[name], state.square[name], rate * scales[name], state)
                state.average[name].lerp_(p, 1 - decay)
        return True

    def _judge(self, parameters: Mapping[str, nn.Parameter], state: _State) -> None:
        """Edit state: what the averaged weights are worth."""
        own = {n: p.detach().clone() for n, p in parameters.items()}
        _put(parameters, state.average)
        found = self.loss(self.student)
        _put(parameters, own)
        state.stale += 1
        if found < state.best:
            state.best, state.kept, state.stale = found, state.step, 0
            state.chosen = {n: t.clone() for n, t in state.average.items()}

    def _loss(self, found: list[Tensor], wanted: Any) -> Tensor:
        if self.options.loss == "distillation":
            return fidelity_of(self.teacher).damage(found, wanted).mean()
        return self.task.training_loss(found, wanted)

    def _judges(self) -> Iterator[tuple[Tensor, Any]]:
        """Inputs that judge, and what is wanted of them; the teacher's answers are computed once."""
        for i, (x, labels) in enumerate(self.pool.judges(self.options.batch)):
            x = channels_last(x).to(self.device)
            if self.options.loss != "distillation":
                yield x, labels
                continue
            if i == len(self._answers):
                with torch.no_grad(), self._precision():
                    self._answers.append(flat(self.teacher(x)))
            yield x, self._answers[i]

    def _precision(self) -> AbstractContextManager[Any]:
        """Mixed precision on a GPU; bfloat16 has the range of float32, so no loss is scaled."""
        if self.device.startswith("cuda"):
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def _restored(self, start: Mapping[str, Tensor]) -> _State:
        """The state in the checkpoint; without one, that before the first step."""
        if self.checkpoint is not None and self.checkpoint.is_file():
            try:
                stored = torch.load(self.checkpoint, self.device, weights_only=True)
                return _State(**stored)
            except DAMAGED as damage:
                log.warning("%s: unreadable, training again: %s", self.checkpoint, damage)
        first = self.loss(self.student)
        if not math.isfinite(first):
            raise ConfigError(f"finetune: the loss is {first} before the first step")
        fresh = [{n: t.clone() for n, t in start.items()} for _ in range(3)]
        none = [{n: torch.zeros_like(t) for n, t in start.items()} for _ in range(2)]
        return _State(0, 0, 0, first, first, False, *fresh, *none)

    def _store(self, state: _State) -> None:
        if self.checkpoint is not None:
            with replacing(self.checkpoint, "wb") as file:
                torch.save(vars(state), file)


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of nested outputs."""
    return [o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor)]


def _prepare(gm: fx.GraphModule) -> None:
    """Edit gm: cuDNN computes gradients of recurrent layers in training mode only; without dropout that changes nothing."""
    gm.eval()
    for module in gm.modules():
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0
            module.train()


def _scale(name: str, weight: Tensor) -> Tensor:
    """What a step is relative to: the root mean square of a weight's channel; the factor of a step size is near 1."""
    if name.endswith("log_step"):
        return torch.ones_like(weight)
    whole = float(weight.square().mean().sqrt())
    if weight.ndim < 2:
        return torch.full_like(weight, max(whole, SMALLEST))
    rows = weight.square().mean(list(range(1, weight.ndim)), keepdim=True).sqrt()
    return rows.clamp_min(max(MIN_CHANNEL_SCALE * whole, 1e-12))


def _schedule(step: int, steps: int) -> float:
    """Share of the rate: a short rise, then half a cosine down to a hundredth."""
    rise = max(1.0, WARM_UP * steps)
    return min(1.0, step / rise) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


def _adam(p: Tensor, g: Tensor, mean: Tensor, square: Tensor, rate: Tensor, state: _State) -> None:
    """Edit p and its moments: one step of Adam with a rate for each weight."""
    mean.lerp_(g, 1 - BETAS[0])
    square.lerp_(g.square(), 1 - BETAS[1])
    first, second = (1 - b**state.step for b in BETAS)
    p.sub_(rate * (mean / first) / ((square / second).sqrt() + EPS))


def _put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Edit the parameters: set their values."""
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(values[name])


def _mixed(x: Tensor, random: np.random.Generator) -> Tensor:
    """Three quarters of a batch mirrored or cut out, each in another way."""
    kinds = random.integers(0, 4, len(x)).tolist()
    generator = torch.Generator().manual_seed(int(random.integers(2**31)))
    views = [
        part if kind == 0 else random_view(part, kind == 1, generator)
        for part, kind in zip(x.split(1), kinds, strict=True)
    ]
    return torch.cat(views)
