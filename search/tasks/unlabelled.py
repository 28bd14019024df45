"""Any network without a metric: all is decided by the distance of its outputs to the float network's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from rewriter.damage import Purpose
from search.config.schema import Config, ConfigError


class Unlabelled:
    """Labels are not read; what the outputs mean is said by ``outputs:``, or else assumed from the graph and said."""

    name = "unlabelled"
    metric = "none"
    higher_is_better = True
    purpose: Purpose = "unknown"

    def per_sample(self, outputs: Sequence[Tensor], targets: Any) -> Tensor | None:
        """There is no metric."""
        del outputs, targets

    def score(self, outputs: Sequence[Tensor], targets: Any, index: Any = None) -> float:
        """There is no metric."""
        del outputs, targets, index
        return float("nan")

    def training_loss(self, outputs: Sequence[Tensor], targets: Any) -> Tensor:
        """There is none.

        Raises:
            ConfigError: always.
        """
        del outputs, targets
        raise ConfigError("finetune.loss: labels: task unlabelled has none; use distillation")

    def attach(self, gm: fx.GraphModule) -> None:
        """Nothing to note."""
        del gm


def make(cfg: Config) -> Unlabelled:
    """The task; a config says nothing more of it."""
    del cfg
    return Unlabelled()
