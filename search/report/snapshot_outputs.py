"""What the float, the plain int8 and the rewritten network say on a few samples: boxes, or scores over time."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewriter import Quantized
from rewriter.graph import channels_last
from search.scoring.evaluator import RewriteEvaluator
from search.tasks.detection import Detection
from search.tasks.video import Video, labels_of, scores_of

SHOWN = 3
LEAST_SCORE = 0.3  # boxes below are not drawn
MOST_BOXES = 40
LONGEST_SIDE = 480


def outputs_shown(
    evaluator: RewriteEvaluator,
    networks: Mapping[str, Quantized],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    names: Mapping[int, str] | None = None,
) -> dict[str, Any] | None:
    """Outputs on the samples that plain int8 damages most, and on one of middling damage.

    Args:
        evaluator: Of the run.
        networks: Quantized networks by what to call them.
        mean: With which the inputs were normalized, to show them as images; None: they are stretched.
        std: By which they were divided.
        names: Of the classes.

    Returns:
        Plain JSON values with ``kind`` ``boxes`` or ``scores``; None for other tasks.
    """
    if not isinstance(evaluator.task, Detection | Video):
        return None
    index = _chosen(evaluator)
    x = torch.cat([next(iter(evaluator.samples.batches(1, i, i + 1))) for i in index])
    by_name = {"float": [o[index] for o in evaluator.reference()]}
    with torch.no_grad():
        for name, quantized in networks.items():
            by_name[name] = [o.cpu() for o in evaluator.runner(quantized)(channels_last(x))]
    targets = evaluator.samples.targets
    labels = None if targets is None else [targets[i] for i in index]
    numbers = [int(evaluator.samples.order[i]) for i in index]
    if isinstance(evaluator.task, Video):
        return {"kind": "scores", "sequences": _sequences(by_name, labels, numbers)}
    found = {name: evaluator.task.detect(outputs) for name, outputs in by_name.items()}
    images: list[dict[str, Any]] = [
        {
            "sample": numbers[i],
            "size": [int(x.shape[-1]), int(x.shape[-2])],
            "jpeg": jpeg(x[i], mean, std),
            "boxes": {name: _boxes(rows[i]) for name, rows in found.items()},
            "truth": None if labels is None else _boxes(labels[i]),
        }
        for i in range(len(index))
    ]
    seen = {
        int(b[4])
        for i in images
        for rows in (*i["boxes"].values(), i["truth"] or ())
        for b in rows
    }
    return {
        "kind": "boxes",
        "least_score": LEAST_SCORE,
        "images": images,
        "names": {str(k): v for k, v in sorted((names or {}).items()) if k in seen},
    }


def _chosen(evaluator: RewriteEvaluator) -> list[int]:
    """Positions of the two samples of most damage in plain int8, and of the one in the middle."""
    known = evaluator.records.samples("")
    if known is None:
        return list(range(min(SHOWN, evaluator.samples.count)))
    order = np.argsort(-np.nan_to_num(known.damage), kind="stable")
    picked = [*order[: SHOWN - 1], order[len(order) // 2]]
    return list(dict.fromkeys(int(i) for i in picked))


def _boxes(found: Mapping[str, Tensor]) -> list[list[float]]:
    """Rows of x1, y1, x2, y2, label and, where there is one, score; the best first."""
    boxes, labels = found["boxes"].reshape(-1, 4), found["labels"]
    if "scores" not in found:
        rows = torch.cat([boxes, labels[:, None].to(boxes)], 1)
        return [[round(v, 3) for v in row] for row in rows.tolist()]
    scores = found["scores"]
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= LEAST_SCORE][:MOST_BOXES]
    rows = torch.cat([boxes, labels[:, None].to(boxes), scores[:, None].to(boxes)], 1)[order]
    return [[round(v, 3) for v in row] for row in rows.tolist()]


def jpeg(
    x: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    side: int = LONGEST_SIDE,
) -> str:
    """An input (C, H, W) as a JPEG in base64."""
    pixels = x.detach().float().cpu()
    if mean is not None and std is not None:
        pixels = pixels * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    low, high = float(pixels.min()), float(pixels.max())
    if low < -0.01 or high > 1.01:
        pixels = (
            pixels / 255 if low >= 0 and high <= 255 else (pixels - low) / max(high - low, 1e-9)
        )
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(array))
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=82)
    return base64.b64encode(stream.getvalue()).decode()


def _sequences(
    by_name: Mapping[str, list[Tensor]], labels: Sequence[Any] | None, numbers: Sequence[int]
) -> list[dict[str, Any]]:
    scores = {name: scores_of(outputs) for name, outputs in by_name.items()}
    truth = None if labels is None else labels_of(by_name["float"], labels)
    return [
        {
            "sample": number,
            "scores": {n: [float(f"{v:.5g}") for v in rows[i]] for n, rows in scores.items()},
            "truth": None if truth is None else truth[i].tolist(),
        }
        for i, number in enumerate(numbers)
    ]
