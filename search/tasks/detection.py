"""Object detection: COCO average precision of the post-processed outputs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from rewriter.damage import Purpose
from rewriter.graph import unflatten
from search.config.schema import Config, ConfigError
from search.data.user_code import blame, call_factory
from search.tasks.average_precision import Matches, average_precision, match

Detections = list[dict[str, Tensor]]
POSTPROCESS_BATCH = 32
KEYS = ("boxes", "scores", "labels")


class Detection:
    """AP over IoU .50:.95 of xyxy boxes; the postprocess is the user's own code.

    Args:
        postprocess: raw outputs, nested as ``forward`` returns them -> for each image ``boxes`` (n, 4) xyxy in pixels,
            ``scores`` (n,), ``labels`` (n,).
        unflatten: nests the flat outputs as ``forward`` returned them; set when the model is traced.
    """

    name = "detection"
    metric = "ap"
    higher_is_better = True
    purpose: Purpose = "decoded"

    def __init__(self, postprocess: Callable[[Any], Detections]) -> None:
        self.postprocess = postprocess
        self.unflatten: Callable[[list[Tensor]], Any] = _as_returned

    def detect(self, outputs: Sequence[Tensor]) -> Detections:
        """Boxes of every image.

        Raises:
            ConfigError: the postprocess raises (its exception is the cause), or returns something
                else than ``boxes``, ``scores`` and ``labels`` for each image.
        """
        found: Detections = []
        for parts in zip(*[o.split(POSTPROCESS_BATCH) for o in outputs], strict=True):
            with torch.no_grad():
                nested = self.unflatten(list(parts))
                try:
                    made = self.postprocess(nested)
                except Exception as error:
                    raise ConfigError(f"postprocess: {blame(error)}") from error
            found += _checked(made, len(parts[0]))
        return found

    def per_sample(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> Tensor | None:
        """AP is no mean over images: there is no value for each sample."""
        del outputs, targets

    def matches(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> list[Matches]:
        """What intervals are resampled from (``resampled``)."""
        return match(self.detect(outputs), list(targets))

    def resampled(
        self, matches: list[Matches], weights: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """AP (B,) for each row of image weights (B, images)."""
        return average_precision(matches, weights)[0]

    def score(
        self,
        outputs: Sequence[Tensor],
        targets: Sequence[Any],
        index: Sequence[int] | None = None,
    ) -> float:
        """AP in [0, 1] on all images or on those in ``index``."""
        if index is not None:
            rows = torch.as_tensor(index)
            outputs, targets = [o[rows] for o in outputs], [targets[int(i)] for i in index]
        return coco_ap(self.detect(outputs), list(targets))[0]

    def training_loss(self, outputs: Sequence[Tensor], targets: Any) -> Tensor:
        """There is none: how raw outputs are matched with boxes is known to the user's training code alone.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "finetune.loss: labels: a detector's loss is not known; use distillation, which needs no labels"
        )

    def attach(self, gm: fx.GraphModule) -> None:
        """The postprocess reads the outputs nested as the user's ``forward`` returns them."""
        self.unflatten = lambda flat: unflatten(gm, list(flat))


def make(cfg: Config) -> Detection:
    """The task with the config's postprocess.

    Raises:
        ConfigError: there is none that can be called.
    """
    if cfg.postprocess is None:
        raise ConfigError(f"{cfg.path.name}: task detection: missing postprocess: factory")
    made = call_factory(cfg, "postprocess", cfg.postprocess.factory, cfg.postprocess.args)
    if not hasattr(made, "__call__"):  # noqa: B004 - callable() would lose the type Any
        kind = type(made).__name__
        raise ConfigError(f"postprocess: factory returned nothing that can be called: {kind}")
    return Detection(made)


def _checked(made: Any, count: int) -> Detections:
    """What the user's postprocess returned for `count` images, if it has the promised form."""
    if not isinstance(made, list | tuple) or len(made) != count:
        shown = f"{len(made)} values" if isinstance(made, list | tuple) else type(made).__name__
        raise ConfigError(
            f"postprocess: must return a list of {count}, one for each image: {shown}"
        )
    for i, image in enumerate(made):
        if not isinstance(image, Mapping):
            kind = type(image).__name__
            raise ConfigError(
                f"postprocess: image {i}: must be a dict of {', '.join(KEYS)}: {kind}"
            )
        wrong = [key for key in KEYS if not isinstance(image.get(key), Tensor)]
        if wrong:
            raise ConfigError(f"postprocess: image {i}: {wrong[0]} is no tensor")
        n = image["scores"].numel()
        if image["boxes"].numel() != 4 * n or image["labels"].numel() != n:
            shapes = ", ".join(f"{key} {tuple(image[key].shape)}" for key in KEYS)
            raise ConfigError(f"postprocess: image {i}: not (n, 4), (n,) and (n,): {shapes}")
    return list(made)


def _as_returned(flat: list[Tensor]) -> Any:
    return flat[0] if len(flat) == 1 else tuple(flat)


def coco_ap(detections: Detections, targets: list[dict[str, Any]]) -> tuple[float, float]:
    """AP (.50:.95) and AP50, each in [0, 1], by faster-coco-eval."""
    from faster_coco_eval import COCO, COCOeval_faster

    if not any(len(t["labels"]) for t in targets):
        return float("nan"), float("nan")
    dataset, results = _coco_dataset(targets), _coco_results(detections)
    if not results:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        evaluation = COCOeval_faster(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def _coco_dataset(targets: list[dict[str, Any]]) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for i, target in enumerate(targets):
        crowd = target.get("crowd", torch.zeros(len(target["labels"])))
        rows = zip(_xywh(target["boxes"]), target["labels"].tolist(), crowd.tolist(), strict=True)
        for box, label, is_crowd in rows:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": int(label) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(is_crowd),
                }
            )
    labels = {a["category_id"] for a in annotations}
    return {
        "images": [{"id": i + 1} for i in range(len(targets))],
        "annotations": annotations,
        "categories": [{"id": c} for c in sorted(labels)],
    }


def _coco_results(detections: Detections) -> list[dict[str, Any]]:
    return [
        {"image_id": i + 1, "category_id": int(label) + 1, "bbox": box, "score": score}
        for i, found in enumerate(detections)
        for box, label, score in zip(
            _xywh(found["boxes"]), found["labels"].tolist(), found["scores"].tolist(), strict=True
        )
    ]


def _xywh(boxes: Tensor) -> list[list[float]]:
    boxes = boxes.reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
