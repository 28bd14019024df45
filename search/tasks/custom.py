"""Any network, by a metric of the user's own: a callable on all outputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from rewriter.damage import Purpose
from rewriter.graph import unflatten
from search.config.schema import Config, ConfigError
from search.data.user_code import blame, imported

Metric = Callable[[Any, Any], float]
GROUPS = 32  # of samples, one of which is left out at a time: as many calls of the metric


@dataclass(frozen=True)
class Influences:
    """How the metric changes with the samples.

    Attributes:
        whole: The metric on all samples.
        group: (n,) number of the group that each sample is in.
        influence: (groups,) what a group adds to the metric: (groups - 1) (whole - without the group).
    """

    whole: float
    group: NDArray[np.intp]
    influence: NDArray[np.float64]


class Custom:
    """A metric that is the user's own code, called with what the network returned for all samples and their targets.

    Args:
        function: (outputs, targets) -> number. Outputs are batched as ``forward`` returns them, a tensor (n, ...) or nested
            tensors; targets are a tensor (n, ...) where they are numbers or tensors of one shape, else a list of n.
        higher_is_better: Direction of the number.
    """

    name = "custom"
    purpose: Purpose = "unknown"

    def __init__(self, function: Metric, higher_is_better: bool = True) -> None:
        self.function = function
        named: Any = function.func if isinstance(function, partial) else function
        self.metric = str(getattr(named, "__name__", type(named).__name__)).strip("<>")
        self.higher_is_better = higher_is_better
        self.unflatten: Callable[[list[Tensor]], Any] = _as_returned

    def per_sample(self, outputs: Sequence[Tensor], targets: Any) -> Tensor | None:
        """Whether the metric is a mean over samples is not known."""
        del outputs, targets

    def score(self, outputs: Sequence[Tensor], targets: Any, index: Any = None) -> float:
        """The metric of all samples, or of those that `index` lists.

        Raises:
            ConfigError: the user's code raises (its exception is the cause), or returns no number.
        """
        if index is not None:
            rows = torch.as_tensor(index)
            outputs = [o[rows] for o in outputs]
            targets = targets[rows] if isinstance(targets, Tensor) else [targets[i] for i in rows]
        try:
            value: Any = self.function(self.unflatten(list(outputs)), targets)
            value = value.item() if hasattr(value, "item") else value
        except Exception as error:
            raise ConfigError(f"metric: {blame(error)}") from error
        if not isinstance(value, Real):
            raise ConfigError(f"metric: {self.metric}: must return a number: {value!r:.60}")
        return float(value)

    def matches(self, outputs: Sequence[Tensor], targets: Any) -> Influences:
        """What intervals are resampled from (``resampled``): the metric without each of some groups of samples."""
        count = len(targets)
        groups = min(GROUPS, count)
        group = np.arange(count) % max(groups, 1)
        whole = self.score(outputs, targets)
        without = [
            self.score(outputs, targets, np.flatnonzero(group != g)) if groups > 1 else whole
            for g in range(groups)
        ]
        return Influences(whole, group, (groups - 1) * (whole - np.array(without)))

    def resampled(self, matches: Influences, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The metric (B,) for each row of sample weights (B, n), linear in the weights of the groups.

        A metric takes too long to be called for each bootstrap sample. Source: Efron 1982, The Jackknife, the Bootstrap and
        Other Resampling Plans, chapter 6 (the bootstrap of the linear part is the jackknife).
        """
        groups = len(matches.influence)
        sizes = np.bincount(matches.group, minlength=groups)
        shares = np.stack([np.bincount(matches.group, row, groups) for row in weights]) / sizes
        # the mean weight of a group varies less than that of a sample, by which its influence is counted too small
        spread = np.sqrt(len(matches.group) / groups)
        return matches.whole + spread * (shares - 1) @ matches.influence / groups

    def training_loss(self, outputs: Sequence[Tensor], targets: Any) -> Tensor:
        """There is none: a metric need not be differentiable.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "finetune.loss: labels: a custom task has no loss; use distillation, which needs no labels"
        )

    def attach(self, gm: fx.GraphModule) -> None:
        """The metric reads the outputs nested as the user's ``forward`` returns them."""
        self.unflatten = lambda flat: unflatten(gm, list(flat))


def make(cfg: Config) -> Custom:
    """The task with the config's metric.

    Raises:
        ConfigError: there is none that can be called.
    """
    assert cfg.metric is not None  # the schema sees to it
    function = imported(cfg, "metric", cfg.metric.factory)
    better, given = cfg.metric.higher_is_better, dict(cfg.metric.args)
    return Custom(partial(function, **given) if given else function, better)


def _as_returned(flat: list[Tensor]) -> Any:
    return flat[0] if len(flat) == 1 else tuple(flat)
