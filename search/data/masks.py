"""Images with a class for each pixel: a folder of mask images, COCO's objects, or YOLO's polygons.

A mask is stretched with its image, to the nearest pixel. Objects of COCO and YOLO have the classes 1, 2, ... in the order
of their categories, in front of the background, 0; small ones lie on top of large ones, and crowds are left out (255).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from search.config.messages import reason
from search.config.schema import ConfigError, DataConfig
from search.data.images import Data, image_files, need_folders
from search.data.stretched import Frame, divided, frame_of

IGNORED = 255
LARGEST_CLASS = 254


@dataclass(frozen=True)
class _Object:
    """Where an object is: polygons of (x, y) as fractions of the image, or a mask of the file's size."""

    label: int
    area: float
    polygons: Sequence[NDArray[np.float64]]
    mask: NDArray[np.bool_] | None = None


def mask_folder(masks: Path, images: Path, cfg: DataConfig) -> Data:
    """Mask images of class indices (gray or with a palette), called as the images but for the ending.

    A mask may also carry a suffix behind the name of its image, as in ``a_mask.png``.

    Raises:
        ConfigError: a folder is missing, or an image has no mask or several.
    """
    need_folders(masks=masks, images=images)
    known: dict[str, list[Path]] = {}
    for file in image_files(masks):
        known.setdefault(str(file.relative_to(masks).with_suffix("")), []).append(file)
    pairs: list[tuple[Path, Path]] = []
    for image in image_files(images):
        stem = str(image.relative_to(images).with_suffix(""))
        found = known.get(stem) or [
            f for name, files in known.items() if name.startswith(f"{stem}_") for f in files
        ]
        if len(found) != 1:
            fact = "no mask" if not found else f"{len(found)} masks"
            raise ConfigError(f"data.masks: {fact} for {image.name} in {masks}")
        pairs.append((image, found[0]))
    frame = frame_of(cfg, "masks")

    def made(row: tuple[Path, Path]) -> tuple[Tensor, Tensor]:
        x, _ = frame.read(row[0])
        with Image.open(row[1]) as mask:
            if mask.mode not in ("L", "P", "1", "I", "I;16"):
                raise ConfigError(
                    f"data.masks: {row[1].name}: colors ({mask.mode}); a mask holds class indices"
                )
            small = mask.resize((frame.size[1], frame.size[0]), Image.Resampling.NEAREST)
        return x, torch.from_numpy(np.array(small).astype(np.int64))

    return divided(images, [p[0] for p in pairs], pairs, made, cfg, {})


def coco_masks(annotations: Path, images: Path, cfg: DataConfig) -> Data:
    """Objects of COCO's JSON, polygons or run lengths, painted into masks.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        number = {
            c["id"]: i
            for i, c in enumerate(sorted(content["categories"], key=lambda c: c["id"]), 1)
        }
        names = {number[c["id"]]: str(c["name"]) for c in content["categories"] if "name" in c}
        by_image: dict[Any, list[Any]] = {}
        for entry in content["annotations"]:
            by_image.setdefault(entry["image_id"], []).append(entry)
        rows = [
            (
                images / i["file_name"],
                [
                    _coco_object(o, number, i["width"], i["height"])
                    for o in by_image.get(i["id"], [])
                ],
            )
            for i in content["images"]
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.coco: cannot be read: {annotations}: {reason(error)}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"data.coco: {annotations.name}: not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        fact = f"not COCO's format with segmentation: {type(error).__name__}: {error}"
        raise ConfigError(f"data.coco: {annotations.name}: {fact}") from error
    return _painted(images, rows, cfg, {0: "background", **names})


def _coco_object(
    entry: Mapping[str, Any], number: Mapping[Any, int], width: int, height: int
) -> _Object:
    label = IGNORED if entry.get("iscrowd") else number[entry["category_id"]]
    where, area = entry["segmentation"], float(entry.get("area", 0))
    if isinstance(where, dict):
        from faster_coco_eval.core import mask as runs

        if isinstance(where["counts"], list):
            where = runs.frPyObjects(where, height, width)
        return _Object(label, area, (), np.asarray(runs.decode(where), bool))
    scale = np.array([width, height], np.float64)
    polygons = [np.array(p, np.float64).reshape(-1, 2) / scale for p in where]
    return _Object(label, area or sum(map(_area, polygons)), polygons)


def _area(polygon: NDArray[np.float64]) -> float:
    x, y = polygon.T
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


def yolo_masks(labels: Path, images: Path, cfg: DataConfig) -> Data:
    """YOLO's text labels with polygons: class x1 y1 x2 y2 ... as fractions; an image without a file has no objects.

    Raises:
        ConfigError: a folder is missing or a line malformed.
    """
    need_folders(yolo=labels, images=images)
    files = image_files(images)
    rows = [(f, _polygons(labels / f"{f.stem}.txt")) for f in files]
    return _painted(images, rows, cfg, {})


def _polygons(text: Path) -> list[_Object]:
    found: list[_Object] = []
    lines = text.read_text(encoding="utf-8").splitlines() if text.exists() else []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        try:
            label, places = int(words[0]), np.array([float(w) for w in words[1:]])
        except ValueError as error:
            raise ConfigError(f"data.yolo: {text.name}:{number}: {error}") from error
        if len(places) < 6 or len(places) % 2 or label < 0 or not np.isfinite(places).all():
            raise ConfigError(
                f"data.yolo: {text.name}:{number}: expected class x1 y1 x2 y2 x3 y3 ...: {line.strip()[:60]!r}"
            )
        polygon = places.reshape(-1, 2)
        found.append(_Object(label + 1, _area(polygon), [polygon]))
    return found


def _painted(
    source: Path,
    rows: Sequence[tuple[Path, list[_Object]]],
    cfg: DataConfig,
    names: dict[int, str],
) -> Data:
    largest = max(
        (o.label for _, objects in rows for o in objects if o.label != IGNORED), default=0
    )
    if largest > LARGEST_CLASS:
        raise ConfigError(f"data: class {largest}: masks hold at most {LARGEST_CLASS}")
    frame = frame_of(cfg, "masks")
    return divided(
        source,
        [r[0] for r in rows],
        rows,
        lambda row: (frame.read(row[0])[0], _mask(row[1], frame)),
        cfg,
        names,
    )


def _mask(objects: Sequence[_Object], frame: Frame) -> Tensor:
    height, width = frame.size
    canvas = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(canvas)
    for found in sorted(objects, key=lambda o: -o.area):
        for polygon in found.polygons:
            pen.polygon(
                [(x * width - 0.5, y * height - 0.5) for x, y in polygon], fill=found.label
            )
        if found.mask is not None:
            shape = Image.fromarray(found.mask.astype(np.uint8) * 255)
            small = shape.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(found.label, (0, 0, width, height), small)
    return torch.from_numpy(np.array(canvas).astype(np.int64))
