"""Keypoints: share of points found (PCK), mean normalized error (NME) or object keypoint similarity (OKS)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rewriter.damage import Purpose
from search.config.schema import Config, ConfigError
from search.tasks._prediction import Postprocess, PredictionTask, postprocess_of, targets_as

Measure = Literal["pck", "nme", "oks"]
MEASURES = ("pck", "nme", "oks")
PCK_THRESHOLD = 0.05
# A typical constant of COCO's seventeen; its own differ by point (k = 2 sigma, from .05 to .21).
OKS_CONSTANT = 0.1


class Keypoints(PredictionTask):
    """Points (n, K, 2) in pixels or any unit; targets (K, 2), or (K, 3) with a visibility, 0 where a point is not labeled.

    The prediction may be (n, 2 K), (n, K, 2), (n, K, 3) with scores, or heatmaps (n, K, h, w), of which the highest place
    is taken (so that targets are in pixels of the heatmap). Errors are relative to the larger side of the box around a
    sample's labeled points; a sample whose points span no box says nothing.

    Args:
        measure: ``pck``: share of points nearer than 5 % of that side; ``nme``: mean distance over it (lower is better);
            ``oks``: mean of exp(-d^2 / (2 area k^2)) with the area of that box and one k for all points.
        postprocess: Outputs to points.
    """

    name = "keypoints"
    means: Purpose = "places"

    def __init__(self, measure: Measure = "pck", postprocess: Postprocess | None = None) -> None:
        super().__init__(postprocess)
        self.metric = measure
        self.higher_is_better = measure != "nme"

    def values(self, prediction: Any, targets: Any) -> Tensor:
        points = points_of(prediction)
        wanted = targets_as(targets, len(points), "points (K, 2) or (K, 3)")
        return torch.stack(
            [self._value(p, t.double()) for p, t in zip(points, wanted, strict=True)]
        )

    def _value(self, points: Tensor, target: Tensor) -> Tensor:
        shape, count = tuple(target.shape), len(points)
        if target.ndim == 1 and len(target) in (2 * count, 3 * count):
            target = target.reshape(count, -1)
        if target.ndim != 2 or len(target) != count or target.shape[1] not in (2, 3):
            raise ConfigError(f"data: {count} points for a target of shape {shape}")
        seen = torch.isfinite(target).all(1) & (
            (target[:, 2] > 0) if target.shape[1] == 3 else True
        )
        if not bool(seen.any()):
            return torch.tensor(float("nan"), dtype=torch.float64)
        place = target[seen, :2]
        sides = place.amax(0) - place.amin(0)
        size, area = float(sides.max()), float(sides.prod())
        if size == 0 or (self.metric == "oks" and area == 0):
            return torch.tensor(float("nan"), dtype=torch.float64)
        # a point that is not finite is as wrong as can be, and does not pass for one without a label
        distance = (points[seen] - place).norm(dim=1).nan_to_num(float("inf"), float("inf"))
        if self.metric == "pck":
            return (distance <= PCK_THRESHOLD * size).double().mean()
        if self.metric == "nme":
            return (distance / size).mean()
        return torch.exp(-distance.square() / (2 * area * OKS_CONSTANT**2)).mean()


def points_of(prediction: Any) -> Tensor:
    """(n, K, 2) float64 points.

    Raises:
        ConfigError: the prediction has another form.
    """
    x = prediction.double().cpu() if isinstance(prediction, Tensor) else torch.zeros(0)
    if x.ndim == 2 and x.shape[1] % 2 == 0:
        return x.reshape(len(x), -1, 2)
    if x.ndim == 3 and x.shape[2] in (2, 3):
        return x[..., :2]
    if x.ndim == 4:
        best = x.flatten(2).argmax(2)
        return torch.stack([best % x.shape[3], best // x.shape[3]], 2).double()
    shape = tuple(getattr(prediction, "shape", ())) or type(prediction).__name__
    raise ConfigError(
        f"task keypoints: the prediction must be (n, 2 K), (n, K, 2) or (n, K, h, w): {shape}; see postprocess"
    )


def make(cfg: Config) -> Keypoints:
    """The task that a config asks for."""
    return Keypoints(option(cfg, "measure", MEASURES), postprocess_of(cfg))


def option(cfg: Config, name: str, choices: tuple[str, ...]) -> Any:
    """A word of ``task_args``, the first of the choices where it is not given.

    Raises:
        ConfigError: it is none of them.
    """
    value = cfg.task_args.get(name, choices[0])
    if value not in choices:
        raise ConfigError(f"task_args.{name}: {value!r}; must be one of {', '.join(choices)}")
    return value
