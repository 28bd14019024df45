"""COCO average precision of any resample of the images, for paired bootstrap intervals.

faster-coco-eval gives the figure itself; its per-image matches live in C++ and cannot be resampled. Here the
matches are made once, in numpy, and only the accumulation is repeated with a weight for each image. A test holds both to each other.
Source: the COCO evaluation protocol (Lin et al., 2014, arXiv:1405.0312).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST_DETECTIONS = 100


@dataclass(frozen=True)
class Matches:
    """All detections of one class with their fate.

    Args:
        image: (n,) index of the image; score: (n,) sorted, highest first.
        hit: (10, n) whether it matched an object at each IoU threshold; ignored: (10, n) matched a crowd.
        objects: (images,) number of objects that count.
    """

    image: NDArray[np.int64]
    score: NDArray[np.float64]
    hit: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    objects: NDArray[np.int64]


def iou(
    boxes: NDArray[np.float64], objects: NDArray[np.float64], crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """(n, m) intersection over union of xyxy boxes; over the box's own area where the object is a crowd."""
    low = np.maximum(boxes[:, None, :2], objects[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], objects[None, :, 2:])
    overlap = np.prod(np.clip(high - low, 0, None), axis=2)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)[:, None]
    union = area + np.prod(objects[:, 2:] - objects[:, :2], axis=1)[None] - overlap
    whole = np.where(crowd[None], area, union)
    return overlap / np.maximum(whole, 1e-12)


def match_image(
    boxes: NDArray[np.float64], objects: NDArray[np.float64], crowd: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Greedy matching of one image's boxes, highest score first, to its objects of the same class.

    Returns:
        hit and ignored, each (10, n).
    """
    order = np.argsort(crowd, kind="stable")  # crowds last: a box takes a real object first
    objects, crowd = objects[order], crowd[order]
    hit = np.zeros((len(THRESHOLDS), len(boxes)), bool)
    ignored = np.zeros_like(hit)
    if len(objects) == 0 or len(boxes) == 0:
        return hit, ignored
    overlaps = iou(boxes, objects, crowd)
    for t, threshold in enumerate(THRESHOLDS):
        taken = np.zeros(len(objects), bool)
        for d in range(len(boxes)):
            best, chosen = min(threshold, 1 - 1e-10), -1
            for g in range(len(objects)):
                if taken[g] and not crowd[g]:
                    continue
                if chosen >= 0 and not crowd[chosen] and crowd[g]:
                    break
                if overlaps[d, g] >= best:
                    best, chosen = overlaps[d, g], g
            if chosen >= 0:
                taken[chosen] = True
                hit[t, d], ignored[t, d] = not crowd[chosen], crowd[chosen]
    return hit, ignored


def match(detections: list[dict[str, Any]], targets: list[dict[str, Any]]) -> list[Matches]:
    """Match all images class by class.

    Args:
        detections: for each image ``boxes`` (n, 4) xyxy, ``scores`` (n,), ``labels`` (n,) tensors.
        targets: for each image ``boxes``, ``labels`` and optionally ``crowd`` (m,) bool.

    Returns:
        One entry for each class that occurs among the targets.
    """
    truth = [_arrays(t) for t in targets]
    found = [_arrays(d) for d in detections]
    classes = sorted({int(c) for t in truth for c in t["labels"]})
    result = []
    for c in classes:
        rows = []
        objects = np.zeros(len(truth), np.int64)
        for i, (d, t) in enumerate(zip(found, truth, strict=True)):
            mine = t["labels"] == c
            crowd = t["crowd"][mine].astype(bool)
            objects[i] = int((~crowd).sum())
            chosen = np.flatnonzero(d["labels"] == c)
            chosen = chosen[np.argsort(-d["scores"][chosen], kind="stable")][:MOST_DETECTIONS]
            hit, ignored = match_image(d["boxes"][chosen], t["boxes"][mine], crowd)
            rows.append((np.full(len(chosen), i), d["scores"][chosen], hit, ignored))
        image = np.concatenate([r[0] for r in rows])
        score = np.concatenate([r[1] for r in rows])
        order = np.argsort(-score, kind="stable")
        result.append(
            Matches(
                image[order],
                score[order],
                np.concatenate([r[2] for r in rows], 1)[:, order],
                np.concatenate([r[3] for r in rows], 1)[:, order],
                objects,
            )
        )
    return result


def _arrays(entry: dict[str, Any]) -> dict[str, NDArray[Any]]:
    boxes = np.asarray(entry["boxes"], np.float64).reshape(-1, 4)
    labels = np.asarray(entry["labels"], np.int64).reshape(-1)
    scores = np.asarray(entry.get("scores", np.ones(len(labels))), np.float64)
    crowd = np.asarray(entry.get("crowd", np.zeros(len(labels), bool)))
    return {"boxes": boxes, "labels": labels, "scores": scores, "crowd": crowd}


def average_precision(
    matches: list[Matches], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AP and AP50 of each weighting of the images.

    Args:
        matches: of every class.
        weights: (B, images) how often each image occurs in each resample.

    Returns:
        AP (mean over classes with objects and over IoU .50:.05:.95) and AP50, each (B,); NaN without any object.
    """
    sums = np.zeros((len(weights), len(THRESHOLDS)))
    classes = np.zeros(len(weights))
    for m in matches:
        positives = weights @ m.objects
        occurs = positives > 0
        if not occurs.any():
            continue
        w = weights[:, None, m.image]  # (B, 1, n)
        hits = np.cumsum(w * m.hit[None], axis=2)
        misses = np.cumsum(w * (~m.hit & ~m.ignored)[None], axis=2)
        precision = hits / np.maximum(hits + misses, 1e-12)
        precision = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]
        sums[occurs] += _interpolated(hits, positives, precision)[occurs]
        classes += occurs
    with np.errstate(invalid="ignore"):
        per_threshold = np.where(classes[:, None] > 0, sums / classes[:, None], np.nan)
    return per_threshold.mean(1), per_threshold[:, 0]


def _interpolated(
    hits: NDArray[np.float64], positives: NDArray[np.float64], precision: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean precision at 101 recalls: hits and precision (B, T, n), positives (B,) -> (B, T)."""
    b, t, n = hits.shape
    if n == 0:
        return np.zeros((b, t))
    # one search for all rows: whole numbers, shifted so that each row has an interval of its own
    needed = np.repeat(_hits_for_recall(np.maximum(positives, 1)), t, axis=0)
    shift = (np.maximum(needed.max(), hits.max()) + 2) * np.arange(b * t)[:, None]
    flat = (hits.reshape(b * t, n) + shift).ravel()
    place = np.searchsorted(flat, (needed + shift).ravel(), side="left")
    place = np.clip(place.reshape(b * t, -1) - n * np.arange(b * t)[:, None], 0, n)
    padded = np.concatenate([precision.reshape(b * t, n), np.zeros((b * t, 1))], 1)
    return np.take_along_axis(padded, place, 1).mean(1).reshape(b, t)


def _hits_for_recall(positives: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, 101) least number of hits whose quotient with ``positives`` reaches each recall, in floating point.

    The reference compares quotients, so that 3 of 10 may or may not reach 0.3; this gives the same answers.
    """
    p = positives[:, None]
    k = np.ceil(RECALLS[None] * p)
    k = np.where((k - 1) / p >= RECALLS[None], k - 1, k)
    return np.where(k / p < RECALLS[None], k + 1, k)
