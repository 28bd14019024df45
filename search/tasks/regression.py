"""Regression of numbers or images: mean absolute error, depth's AbsRel and delta, or peak signal-to-noise ratio."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from search.config.schema import Config, ConfigError
from search.tasks._prediction import Postprocess, PredictionTask, postprocess_of, targets_as
from search.tasks.keypoints import option

MEASURES = ("mae", "rmse", "absrel", "delta", "psnr")
DELTA = 1.25


class Regression(PredictionTask):
    """A number, vector or map for each sample; targets of the same shape (sides of 1 aside), entries that are not finite do not count.

    Args:
        measure: ``mae``; ``rmse`` of a sample; ``absrel``: mean of |error| / target over targets above 0; ``delta``: share of
            entries within a factor of 1.25 (Eigen et al., 2014, arXiv:1406.2283); ``psnr`` in dB, of images in [0, 1].
        postprocess: Outputs to predictions.
    """

    name = "regression"

    def __init__(self, measure: str = "mae", postprocess: Postprocess | None = None) -> None:
        super().__init__(postprocess)
        self.metric = measure
        self.higher_is_better = measure in ("delta", "psnr")

    def values(self, prediction: Any, targets: Any) -> Tensor:
        if not isinstance(prediction, Tensor):
            raise ConfigError(
                f"task regression: the prediction must be a tensor: {type(prediction).__name__}"
            )
        wanted = targets_as(targets, len(prediction), "numbers")
        pairs = zip(prediction.double().cpu(), wanted, strict=True)
        return torch.stack([self._value(p, t.double()) for p, t in pairs])

    def _value(self, found: Tensor, target: Tensor) -> Tensor:
        if found.squeeze().shape != target.squeeze().shape:
            raise ConfigError(
                f"data: a prediction of shape {tuple(found.shape)} for a target of {tuple(target.shape)}"
            )
        found, target = found.reshape(-1), target.reshape(-1)
        used = torch.isfinite(target)
        if self.metric in ("absrel", "delta"):
            used &= target > 0
        found, target = found[used], target[used]
        if not len(target):
            return torch.tensor(float("nan"), dtype=torch.float64)
        # a prediction that is not finite is as wrong as can be, and does not pass for a target that says nothing
        error = (found - target).abs().nan_to_num(float("inf"), float("inf"))
        if self.metric == "mae":
            return error.mean()
        if self.metric == "rmse":
            return error.square().mean().sqrt()
        if self.metric == "absrel":
            return (error / target).mean()
        if self.metric == "delta":
            low = found.clamp_min(1e-9)
            return (torch.maximum(low / target, target / low) < DELTA).double().mean()
        return -10 * error.square().mean().clamp_min(1e-12).log10()

    def training_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Mean absolute error of the entries that count, differentiable."""
        prediction = self.prediction(outputs)
        wanted = torch.stack(targets_as(targets, len(prediction), "numbers")).to(prediction)
        used = torch.isfinite(wanted)
        return (prediction.reshape(wanted.shape)[used] - wanted[used]).abs().mean()


def make(cfg: Config) -> Regression:
    """The task that a config asks for."""
    return Regression(option(cfg, "measure", MEASURES), postprocess_of(cfg))
