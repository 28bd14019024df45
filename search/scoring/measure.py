"""What int8 outputs are worth: metric, interval and damage against the float network's outputs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rewriter.damage import Fidelity
from search.data.evaluation_set import SampleSet
from search.pareto.front import paired_interval, replicate_interval, resampled_indices
from search.run_dir.scores import Array, Samples, Score
from search.tasks import Task

REPLICATES = 500
RUNS = 30  # of one input, behind a latency
Runner = Callable[[Tensor], list[Tensor]]
Part = tuple[int, int]
"""The samples from the first number up to, but without, the second."""


@runtime_checkable
class Resampled(Protocol):
    """A task whose metric is no mean over samples, but can be resampled from stored matches."""

    def matches(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> Any: ...

    def resampled(self, matches: Any, weights: NDArray[np.float64]) -> NDArray[np.float64]: ...


@dataclass
class Measure:
    """Compares outputs with those of the float network, on all samples or on a part of them.

    Attributes:
        task: The metric.
        fidelity: The damage.
        samples: What the outputs are of.
        reference: Gives the float network's flat outputs over all samples, each (n, ...).
    """

    task: Task
    fidelity: Fidelity
    samples: SampleSet
    reference: Callable[[], list[Tensor]]
    _float: dict[Part, tuple[float | None, Samples | None]] = field(
        default_factory=dict[Part, "tuple[float | None, Samples | None]"], init=False
    )

    def float_metric(self, part: Part) -> tuple[float | None, Samples | None]:
        """Metric of the float network and its per-sample values; None and None without labels."""
        if part not in self._float:
            if self.samples.targets is None:
                self._float[part] = None, None
            else:
                outputs = [o[slice(*part)] for o in self.reference()]
                none = np.zeros(part[1] - part[0])
                self._float[part] = self.metric(outputs, part), self._values(outputs, part, none)
        return self._float[part]

    def metric(self, outputs: Sequence[Tensor], part: Part) -> float | None:
        """The task's metric of outputs on a part of the samples; None where it is not finite."""
        value = self.task.score(outputs, self._targets(part))
        return value if math.isfinite(value) else None

    def compare(self, outputs: Sequence[Tensor], part: Part) -> tuple[Score, Samples]:
        """Metric, interval and damage of int8 outputs on a part of the samples.

        The caller fills in what the plan is and costs.
        """
        damage = self._damage(outputs, part)
        score = Score(plan="", macs=0, damage=float(damage.mean()), samples=part[1] - part[0])
        original, reference = self.float_metric(part)
        if original is None or reference is None:
            return score, Samples(damage)
        own = self._values(outputs, part, damage)
        interval = None
        if own.metric is not None and reference.metric is not None:
            interval = paired_interval(own.metric, reference.metric, original)
        elif own.replicates is not None and reference.replicates is not None:
            interval = replicate_interval(own.replicates, reference.replicates, original)
        metric = self.metric(outputs, part)
        found = Score(
            plan="",
            macs=0,
            metric=metric,
            interval=interval,
            original=original,
            damage=score.damage,
            samples=score.samples,
        )
        return found, own

    def _damage(self, outputs: Sequence[Tensor], part: Part) -> Array:
        """(k,) damage of each sample of a part."""
        reference = [o[slice(*part)] for o in self.reference()]
        return self.fidelity.damage(outputs, reference).cpu().numpy()

    def _values(self, outputs: Sequence[Tensor], part: Part, damage: Array) -> Samples:
        targets = self._targets(part)
        values = self.task.per_sample(outputs, targets)
        if values is not None:
            return Samples(damage, metric=values.double().cpu().numpy())
        if not isinstance(self.task, Resampled):
            return Samples(damage)
        matches = self.task.matches(outputs, targets)
        weights = _weights(part[1] - part[0])
        return Samples(damage, replicates=self.task.resampled(matches, weights))

    def _targets(self, part: Part) -> Any:
        return self.samples.targets[slice(*part)]


def latency(runner: Runner, x: Tensor, runs: int = RUNS) -> float:
    """Median milliseconds of one input on this machine, as busy as it is; x is (1, ...)."""
    for _ in range(3):
        runner(x)
    times: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        runner(x)
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 4)


def _weights(count: int) -> NDArray[np.float64]:
    """(REPLICATES, count) how often each sample is in each bootstrap sample."""
    index = resampled_indices(count, REPLICATES)
    return np.stack([np.bincount(row, minlength=count) for row in index]).astype(np.float64)
