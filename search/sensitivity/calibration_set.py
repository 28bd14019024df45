"""Is the calibration set good: does it cover the ranges that evaluation needs, is it of the same kind, how many images are enough.

Only the float network is run. Ranges are the extremes of each value that a layer or an activation writes, image by image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from rewriter.graph import channels_last, walk

BEYOND = 0.1  # of a range's width, by which an image must leave it to count
REACHED = 0.9  # of its final width a range has to have
SETTLED = 0.8  # of the ranges have to have reached it
# Standard deviations between the two sets, in the middle value, from which they are of another kind.
APART = 1.0
# Of the images that leave a range: as many times what chance gives, and this share more.
CHANCES, MORE = 4.0, 0.02
GROWING = 0.15
FEWEST = 16  # calibration images with which nothing is said of how many are enough

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CalibrationSet:
    """What the ranges of a calibration set are worth.

    Attributes:
        images: That calibrate.
        evaluation: Images that they are compared with.
        values: Activations looked at.
        curve: After so many calibration images, the share of the ranges that have nearly their final width.
        enough: The first number of images after which most have; None: they need more than the curve goes to.
        growing: By how much the second half of the images still widens a range, in the mean over values.
        outside: Share of evaluation images that leave a range clearly, in the mean over values.
        worst: The value that is left most often, and by what share of the images.
        apart: How far the two sets lie apart, in standard deviations of an image, in the middle value.
    """

    images: int
    evaluation: int
    values: int
    curve: tuple[tuple[int, float], ...]
    enough: int | None
    growing: float
    outside: float
    worst: tuple[str, float]
    apart: float

    def lines(self) -> list[str]:
        """In sentences."""
        steps = ", ".join(f"{n}: {share:.0%}" for n, share in self.curve)
        said = [
            f"{self.images} images, {self.values} ranges; have nearly their final width after so many images: {steps}",
            f"{self.outside:.1%} of {self.evaluation} evaluation images leave a range by more than a tenth; most often "
            f"{self.worst[0]}: {self.worst[1]:.1%}",
        ]
        if self.enough is not None:
            said.append(f"enough from {self.enough} images on")
        return said

    def warnings(self) -> list[str]:
        """What should be mended before int8 is judged."""
        found: list[str] = []
        if self.apart > APART:
            found.append(
                f"calibration images are of another kind than evaluation images: ranges lie {self.apart:.1f} standard "
                "deviations apart; calibrate on images of the domain, with the same preprocessing"
            )
        if self.outside > CHANCES * 2 / (self.images + 1) + MORE:
            found.append(
                f"{self.outside:.1%} of the evaluation images leave the calibrated ranges: more, or more varied, calibration images"
            )
        if self.growing > GROWING and self.images >= FEWEST:
            found.append(
                f"ranges still grow: by {self.growing:.0%} with the second half of the calibration images; more are needed"
            )
        return found


def calibration_set(
    gm: fx.GraphModule, calibration: Sequence[Tensor], evaluation: Iterable[Tensor]
) -> CalibrationSet:
    """Run the float network over both sets.

    Args:
        gm: Canonical graph.
        calibration: Batches of inputs, (n, ...).
        evaluation: Batches of inputs.
    """
    low, high = _extremes(gm, calibration)
    new_low, new_high = _extremes(gm, evaluation)
    names = [n for n in low if n in new_low]
    lows, highs = (np.stack([d[n] for n in names]) for d in (low, high))
    width = highs.max(1) - lows.min(1)
    kept = width > 0
    names = [n for n, k in zip(names, kept, strict=True) if k]
    lows, highs, width = lows[kept], highs[kept], width[kept]
    new_lows, new_highs = (np.stack([d[n] for n in names]) for d in (new_low, new_high))
    room = BEYOND * width
    left = (new_highs > (highs.max(1) + room)[:, None]) | (
        new_lows < (lows.min(1) - room)[:, None]
    )
    shares = left.mean(1)
    worst = int(shares.argmax())
    curve = _curve(lows, highs, width)
    count = lows.shape[1]
    settled = [n for n, share in curve if share >= SETTLED]
    half = slice(0, max(count // 2, 1))
    grown = (highs[:, half].max(1) - lows[:, half].min(1)) / width
    return CalibrationSet(
        images=count,
        evaluation=new_lows.shape[1],
        values=len(names),
        curve=curve,
        enough=settled[0] if settled else None,
        growing=float(1 - grown.mean()),
        outside=float(shares.mean()),
        worst=(names[worst], float(shares[worst])),
        apart=_apart(highs - lows, new_highs - new_lows),
    )


def _extremes(
    gm: fx.GraphModule, batches: Iterable[Tensor]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """(images,) lowest and highest element of every value, by its name."""
    low: dict[str, list[Tensor]] = {}
    high: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in batches:
            for node, value in walk(gm, (channels_last(batch),)):
                if node.op in ("get_attr", "placeholder") or not isinstance(value, Tensor):
                    continue
                if not value.is_floating_point() or not value.ndim or len(value) != len(batch):
                    continue
                flat = value.flatten(1) if value.ndim > 1 else value[:, None]
                low.setdefault(node.name, []).append(flat.amin(1).cpu())
                high.setdefault(node.name, []).append(flat.amax(1).cpu())
    return (
        {n: torch.cat(v).double().numpy() for n, v in low.items()},
        {n: torch.cat(v).double().numpy() for n, v in high.items()},
    )


def _curve(lows: Array, highs: Array, width: Array) -> tuple[tuple[int, float], ...]:
    """Share of the ranges that are nearly as wide after so many images as after all."""
    count = lows.shape[1]
    sizes = [n for n in (4, 8, 16, 32, 64, 128, 256, 512) if n < count]
    grown = np.maximum.accumulate(highs, 1) - np.minimum.accumulate(lows, 1)
    return tuple((n, float((grown[:, n - 1] >= REACHED * width).mean())) for n in sizes)


def _apart(ours: Array, theirs: Array) -> float:
    """Median over values of the distance of the mean ranges, in standard deviations of one image."""
    spread = np.sqrt((ours.var(1) + theirs.var(1)) / 2)
    distance = np.abs(ours.mean(1) - theirs.mean(1))
    usable = spread > 0
    return float(np.median(distance[usable] / spread[usable])) if usable.any() else 0.0
