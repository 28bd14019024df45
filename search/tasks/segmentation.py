"""Semantic segmentation: mean intersection over union of the classes, over all pixels of all images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rewriter.damage import Purpose
from search.config.schema import Config, ConfigError
from search.tasks._prediction import PredictionTask, postprocess_of, targets_as

IGNORED = 255
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pixels:
    """Pixels of each image by class.

    Attributes:
        both: (n, classes) in prediction and mask.
        either: (n, classes) in prediction or mask.
    """

    both: Floats
    either: Floats


class Segmentation(PredictionTask):
    """A class for each pixel; the prediction is scores (n, classes, h, w), or (n, 1, h, w) of one foreground.

    Targets are masks (H, W) of class indices, 255 where a pixel does not count; scores are resized to the mask (bilinear).
    A single channel is foreground above 0.5 where all its values lie in [0, 1], else above 0.
    """

    name = "segmentation"
    means: Purpose = "pixels"
    metric = "miou"

    def per_sample(self, outputs: Sequence[Tensor], targets: Any) -> Tensor | None:
        """The metric is no mean over images: pixels of all images are counted together."""
        del outputs, targets

    def matches(self, outputs: Sequence[Tensor], targets: Any) -> Pixels:
        """What intervals are resampled from (``resampled``)."""
        scores = self.prediction(outputs)
        if not isinstance(scores, Tensor) or scores.ndim != 4:
            shape = tuple(getattr(scores, "shape", ()))
            raise ConfigError(
                f"task segmentation: scores must be (n, classes, h, w): {shape}; see postprocess"
            )
        masks = targets_as(targets, len(scores), "a mask (H, W) of class indices")
        classes = max(scores.shape[1], 2)
        share = bool(scores.shape[1] == 1 and ((scores >= 0) & (scores <= 1)).all())
        counts = [
            _counts(s, m, classes, 0.5 if share else 0.0)
            for s, m in zip(scores, masks, strict=True)
        ]
        both, either = (torch.stack([c[i] for c in counts]).numpy() for i in (0, 1))
        return Pixels(both, either)

    def resampled(self, matches: Pixels, weights: Floats) -> Floats:
        """The metric (B,) for each row of image weights (B, n)."""
        either = weights @ matches.either
        share = np.where(either > 0, weights @ matches.both / np.maximum(either, 1e-12), np.nan)
        with np.errstate(all="ignore"):
            return np.nanmean(share, axis=1)

    def score(self, outputs: Sequence[Tensor], targets: Any, index: Any = None) -> float:
        """Mean over the classes that occur of pixels in both over pixels in either, as a fraction."""
        found = self.matches(outputs, targets)
        weights = np.ones(len(found.both))
        if index is not None:
            weights = np.bincount(np.asarray(index), minlength=len(found.both)).astype(np.float64)
        return float(self.resampled(found, weights[None])[0])

    def training_loss(self, outputs: Sequence[Tensor], targets: Any) -> Tensor:
        """Mean cross-entropy of the pixels that count, differentiable."""
        scores = self.prediction(outputs)
        masks = torch.stack(targets_as(targets, len(scores), "a mask")).to(scores.device).long()
        scores = _resized(scores.float(), masks.shape[-2:])
        if scores.shape[1] > 1:
            return F.cross_entropy(scores, masks, ignore_index=IGNORED)
        used = masks != IGNORED
        return F.binary_cross_entropy_with_logits(scores[:, 0][used], (masks[used] == 1).float())


def _resized(scores: Tensor, size: Any) -> Tensor:
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)


def _counts(scores: Tensor, mask: Tensor, classes: int, threshold: float) -> tuple[Tensor, Tensor]:
    """(classes,) float64 pixels in both, and in either."""
    mask = mask.squeeze(0) if mask.ndim == 3 and len(mask) == 1 else mask
    if mask.ndim != 2:
        raise ConfigError(f"data: a mask must be (H, W): {tuple(mask.shape)}")
    scores = _resized(scores[None].float().cpu(), mask.shape)[0]
    found = scores.argmax(0) if len(scores) > 1 else (scores[0] > threshold).long()
    mask = mask.long()
    used = mask != IGNORED
    wanted, got = mask[used], found[used]
    if len(wanted) and (int(wanted.min()) < 0 or int(wanted.max()) >= classes):
        wrong = int(wanted.min()) if int(wanted.min()) < 0 else int(wanted.max())
        raise ConfigError(
            f"data: a mask holds {wrong}; the network has {classes} classes, and {IGNORED} is left out"
        )
    both = torch.bincount(wanted[wanted == got], minlength=classes).double()
    either = torch.bincount(wanted, minlength=classes) + torch.bincount(got, minlength=classes)
    return both, either.double() - both


def make(cfg: Config) -> Segmentation:
    """The task that a config asks for."""
    return Segmentation(postprocess_of(cfg))
