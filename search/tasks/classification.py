"""Image classification: top-1 accuracy, and KL divergence to the float model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rewriter.damage import Purpose
from search.config.schema import Config, ConfigError


class Classification:
    """One class for each input; the network's first output is the logits, (n, classes)."""

    name: str = "classification"
    metric: str = "top1"
    higher_is_better: bool = True
    purpose: Purpose = "classes"

    def per_sample(self, outputs: Sequence[Tensor], targets: Any) -> Tensor:
        """(n,) float64: 1 where the largest logit is the target's, else 0.

        Args:
            outputs: [(n, classes)].
            targets: n class indices.

        Raises:
            ConfigError: the outputs are no logits, or a target is no class of them.
        """
        logits = _logits(outputs)
        try:
            labels = torch.as_tensor(targets, device=logits.device).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            shown = f"{type(targets[0]).__name__} {targets[0]!r}"[:60]
            raise ConfigError(f"data: targets must be class indices: {shown}") from error
        if len(labels) != len(logits):
            raise ConfigError(f"data: {len(logits)} outputs for {len(labels)} targets")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ConfigError(f"data: targets must be class indices: {labels.dtype}")
        classes = logits.shape[1]
        low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            known = f"the network's {classes} classes, 0 to {classes - 1}"
            raise ConfigError(f"data: target outside {known}: {wrong}")
        return (logits.argmax(1) == labels).double()

    def score(
        self,
        outputs: Sequence[Tensor],
        targets: Any,
        index: Any = None,
    ) -> float:
        """Top-1 accuracy as a fraction, of all samples or of those that `index` lists."""
        hits = self.per_sample(outputs, targets)
        return float((hits if index is None else hits[torch.as_tensor(index)]).mean())

    def training_loss(self, outputs: Sequence[Tensor], targets: Any) -> Tensor:
        """Mean cross-entropy, differentiable."""
        logits = _logits(outputs).float()
        return F.cross_entropy(logits, torch.as_tensor(targets, device=logits.device).reshape(-1))

    def attach(self, gm: fx.GraphModule) -> None:
        """The logits are the first output, whatever stands beside them."""
        del gm


def make(cfg: Config) -> Classification:
    """The task; a config says nothing more of it."""
    del cfg
    return Classification()


def _logits(outputs: Sequence[Tensor]) -> Tensor:
    if not outputs or outputs[0].dim() != 2:
        shapes = [tuple(x.shape) for x in outputs]
        raise ConfigError(f"model: classification needs logits (n, classes); outputs: {shapes}")
    return outputs[0]
