"""How int8 shifts the scores of a detector, and the threshold that gives back the float one's recall or precision.

A detector is deployed with a threshold on its scores that was chosen in float. Where int8 shifts scores, the same
threshold lets through fewer boxes, or more false ones, although the ranking of boxes, and so AP, is nearly the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

IOU = 0.5  # from which two boxes are the same
LEAST_SCORE = 0.05  # boxes below are no detections
THRESHOLDS = (0.25, 0.5)
Boxes = Mapping[str, Tensor]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Operating:
    """One threshold that was chosen in float, and what int8 makes of it.

    Attributes:
        threshold: In float.
        boxes: Boxes for each image that pass it: in float, in int8.
        precision: Of float, and of int8 at the same threshold; None without labels.
        recall: The same.
        restored: Threshold at which int8 has the float one's recall; without labels, its number of boxes.
        restored_precision: Of int8 there.
        precise: Threshold at which int8 has the float one's precision; None where it never has, or without labels.
        precise_recall: Of int8 there.
    """

    threshold: float
    boxes: tuple[float, float]
    precision: tuple[float, float] | None = None
    recall: tuple[float, float] | None = None
    restored: float | None = None
    restored_precision: float | None = None
    precise: float | None = None
    precise_recall: float | None = None


@dataclass(frozen=True)
class ScoreShift:
    """Scores of the same boxes in float and in int8: quartiles of the difference, int8 - float."""

    images: int
    pairs: int
    median: float
    low: float
    high: float
    lost: int  # boxes of float of at least the smallest threshold that int8 has not at all
    points: tuple[Operating, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_shift(
    reference: Sequence[Boxes], int8: Sequence[Boxes], targets: Sequence[Boxes] | None = None
) -> ScoreShift:
    """Compare the detections of two networks on the same images.

    Args:
        reference: Of the float network, for each image ``boxes`` (n, 4) xyxy, ``scores`` (n,), ``labels`` (n,).
        int8: The same of the int8 network.
        targets: True ``boxes`` and ``labels`` of each image; None: there are none.
    """
    differences: list[float] = []
    lost = 0
    for a, b in zip(reference, int8, strict=True):
        pairs = _pairs(a, b)
        differences += [float(b["scores"][j] - a["scores"][i]) for i, j in pairs]
        found = {i for i, _ in pairs}
        high = torch.nonzero(a["scores"] >= THRESHOLDS[0]).flatten().tolist()
        lost += sum(i not in found for i in high)
    quartiles = np.quantile(differences, (0.25, 0.5, 0.75)) if differences else np.zeros(3)
    known = None if targets is None else (_judged(reference, targets), _judged(int8, targets))
    return ScoreShift(
        images=len(reference),
        pairs=len(differences),
        median=float(quartiles[1]),
        low=float(quartiles[0]),
        high=float(quartiles[2]),
        lost=lost,
        points=tuple(_operating(t, reference, int8, known, targets) for t in THRESHOLDS),
    )


def _pairs(a: Boxes, b: Boxes) -> list[tuple[int, int]]:
    """Boxes of one label that overlap most, the most certain of ``a`` first; each once."""
    found: list[tuple[int, int]] = []
    if not len(a["scores"]) or not len(b["scores"]):
        return found
    iou = box_iou(a["boxes"].reshape(-1, 4).float(), b["boxes"].reshape(-1, 4).float())
    iou = iou * (a["labels"][:, None] == b["labels"][None, :])
    for i in a["scores"].argsort(descending=True, stable=True).tolist():
        if a["scores"][i] < LEAST_SCORE:
            break
        j = int(iou[i].argmax())
        if iou[i, j] >= IOU:
            found.append((i, j))
            iou[:, j] = 0
    return found


def _judged(detections: Sequence[Boxes], targets: Sequence[Boxes]) -> tuple[Array, Array, int]:
    """Scores of all detections, whether each is true (1.0), and how many objects there are."""
    scores: list[float] = []
    true: list[float] = []
    for found, wanted in zip(detections, targets, strict=True):
        truth = {**wanted, "scores": torch.ones(len(wanted["labels"]))}
        kept = found["scores"] >= LEAST_SCORE
        own = {k: found[k][kept] for k in ("scores", "labels")}
        own["boxes"] = found["boxes"].reshape(-1, 4)[kept]
        right = {i for i, _ in _pairs(own, truth)}
        scores += own["scores"].tolist()
        true += [float(i in right) for i in range(len(own["scores"]))]
    return np.array(scores), np.array(true), sum(len(t["labels"]) for t in targets)


def _operating(
    threshold: float,
    reference: Sequence[Boxes],
    int8: Sequence[Boxes],
    known: tuple[tuple[Array, Array, int], tuple[Array, Array, int]] | None,
    targets: Sequence[Boxes] | None,
) -> Operating:
    counts = [
        sum(int((d["scores"] >= threshold).sum()) for d in found) for found in (reference, int8)
    ]
    boxes = (counts[0] / max(len(reference), 1), counts[1] / max(len(int8), 1))
    if known is None or not targets or not known[0][2]:
        every = np.sort(np.concatenate([d["scores"].numpy() for d in int8] or [np.zeros(0)]))[::-1]
        at = (
            _near(threshold, every, min(counts[0], len(every)) - 1)
            if counts[0] and len(every)
            else None
        )
        return Operating(threshold, boxes, restored=at)
    (a_precision, a_recall), (b_precision, b_recall) = (_at(threshold, *k) for k in known)
    scores, true, count = known[1]
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(true[order])
    recall, precision = hits / count, hits / np.arange(1, len(hits) + 1)
    sorted_scores = scores[order]
    reaching = np.flatnonzero(recall >= a_recall - 1e-9)
    restored = precise = None
    if len(reaching):
        first = int(reaching[0])
        last = int(np.flatnonzero(recall <= recall[first] + 1e-9)[-1])
        restored = _near(threshold, sorted_scores, last, first)
    right = np.flatnonzero(precision >= a_precision - 1e-9)
    if len(right):
        precise = _near(threshold, sorted_scores, int(right[-1]))
    return Operating(
        threshold,
        boxes,
        (a_precision, b_precision),
        (a_recall, b_recall),
        restored,
        None if restored is None else _at(restored, *known[1])[0],
        precise,
        None if precise is None else _at(precise, *known[1])[1],
    )


def _near(threshold: float, scores: Array, last: int, first: int | None = None) -> float:
    """The threshold nearest to the float one of those that let through the descending scores up to ``first``.

    They let through none behind ``last``; without ``first``, all up to ``last``.
    """
    low = float(scores[last + 1]) if last + 1 < len(scores) else 0.0
    high = float(scores[last if first is None else first])
    return min(high, max(threshold, low + min(1e-3, (high - low) / 2)))


def _at(threshold: float, scores: Array, true: Array, count: int) -> tuple[float, float]:
    passed = scores >= threshold
    hits = float(true[passed].sum())
    return hits / max(int(passed.sum()), 1), hits / max(count, 1)
