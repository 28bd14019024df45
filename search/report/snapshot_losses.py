"""What int8 loses where: the scores of a detector, the classes and single images of a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewriter import Quantized
from rewriter.graph import channels_last
from search.report.snapshot_outputs import jpeg
from search.scoring.evaluator import RewriteEvaluator
from search.tasks.classification import Classification
from search.tasks.detection import Detection
from search.tasks.score_shift import score_shift

IMAGES = 512  # of the evaluation images, on which this is measured
BATCH = 32
CLASSES, WORST = 12, 6
LONGEST_SIDE = 140


def losses_shown(
    evaluator: RewriteEvaluator,
    networks: Mapping[str, Quantized],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    names: Mapping[int, str] | None = None,
) -> dict[str, Any] | None:
    """Score shift of a detector, or loss by class and the worst images of a classifier.

    Args:
        evaluator: Of the run.
        networks: Quantized networks by what to call them; the last is the one that ships.
        mean: With which the inputs were normalized, to show them as images; None: they are stretched.
        std: By which they were divided.
        names: Of the classes.

    Returns:
        Plain JSON values with ``kind`` ``shift`` or ``classes``; None for other tasks.
    """
    if not isinstance(evaluator.task, Detection | Classification):
        return None
    count = min(IMAGES, evaluator.samples.count)
    by_name = {"float": [o[:count] for o in evaluator.reference()]}
    with torch.no_grad():
        for name, quantized in networks.items():
            run = evaluator.runner(quantized)
            parts = [
                [o.cpu() for o in run(channels_last(x))]
                for x in evaluator.samples.batches(BATCH, 0, count)
            ]
            by_name[name] = [torch.cat(o) for o in zip(*parts, strict=True)]
    targets = evaluator.samples.targets
    labels = None if targets is None else targets[:count]
    if isinstance(evaluator.task, Detection):
        found = {name: evaluator.task.detect(outputs) for name, outputs in by_name.items()}
        truth = None if labels is None else list(labels)
        shifts = {
            name: score_shift(found["float"], found[name], truth).to_dict() for name in networks
        }
        return {"kind": "shift", "networks": shifts}
    return _classes(evaluator, by_name, labels, (mean, std), names or {})


def _classes(
    evaluator: RewriteEvaluator,
    by_name: Mapping[str, list[Tensor]],
    labels: Any,
    scale: tuple[Sequence[float] | None, Sequence[float] | None],
    names: Mapping[int, str],
) -> dict[str, Any]:
    said = {name: outputs[0].flatten(1).argmax(1) for name, outputs in by_name.items()}
    shipped = list(by_name)[-1]
    logits = [by_name[n][0].flatten(1).double() for n in ("float", shipped)]
    p, q = (torch.log_softmax(v, 1) for v in logits)
    damage = (p.exp() * (p - q)).sum(1)
    truth = None if labels is None else torch.as_tensor([int(v) for v in labels])
    rows = [] if truth is None else _by_class(said, truth, shipped)
    # worst are those whose answer changed, or was right and is not, most damaged first
    order = np.lexsort((-damage.numpy(), (said["float"] == said[shipped]).numpy()))
    worst: list[dict[str, Any]] = []
    for i in order[:WORST].tolist():
        x = next(iter(evaluator.samples.batches(1, i, i + 1)))[0]
        worst.append(
            {
                "sample": int(evaluator.samples.order[i]),
                "damage": float(f"{float(damage[i]):.4g}"),
                "label": None if truth is None else int(truth[i]),
                "said": {name: int(v[i]) for name, v in said.items()},
                "jpeg": jpeg(x, *scale, LONGEST_SIDE) if x.ndim == 3 else None,
            }
        )
    changed = int((said["float"] != said[shipped]).sum())
    seen = {c for w in worst for c in (w["label"], *w["said"].values()) if c is not None}
    seen |= {r["class"] for r in rows}
    return {
        "kind": "classes",
        "images": len(damage),
        "changed": changed,
        "shipped": shipped,
        "classes": rows,
        "worst": worst,
        "names": {str(k): v for k, v in sorted(names.items()) if k in seen},
    }


def _by_class(said: Mapping[str, Tensor], truth: Tensor, shipped: str) -> list[dict[str, Any]]:
    """Classes with the most images lost, the most first; each with its right answers by network."""
    rows: list[dict[str, Any]] = []
    for label in truth.unique().tolist():
        own = truth == label
        right = {name: int((v[own] == label).sum()) for name, v in said.items()}
        rows.append({"class": int(label), "images": int(own.sum()), "right": right})
    rows.sort(key=lambda r: (r["right"][shipped] - r["right"]["float"], -r["images"], r["class"]))
    return rows[:CLASSES]
