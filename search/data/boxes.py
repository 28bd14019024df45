"""Images with boxes: COCO's JSON annotations, or YOLO's text labels, one file for each image.

An image is stretched to the square that the network reads, and its boxes with it: (x1, y1, x2, y2) in pixels of the
input. Class indices count the JSON's categories in the order of their ids, from 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from search.config.messages import reason
from search.config.schema import ConfigError, DataConfig
from search.data.images import Data, Inputs, image_files, need_folders, readable, split

LARGEST = 2.0  # of a fraction that is one: a box may reach beyond the image, pixels are far larger


@dataclass(frozen=True)
class LabelledBoxes:
    """One image file and its objects; boxes (n, 4) are fractions of width and height."""

    file: Path
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]


class BoxedImages:
    """(input (C, size, size) float32, {"boxes", "labels", "crowd"}) pairs, read when they are asked for."""

    def __init__(
        self, rows: Sequence[LabelledBoxes], size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.rows, self.size = rows, size
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        row = self.rows[index]
        mode = "L" if len(self.mean) == 1 else "RGB"
        with Image.open(row.file) as image:
            pixels = np.array(
                image.convert(mode).resize((self.size, self.size), Image.Resampling.BILINEAR)
            )
        x = torch.from_numpy(pixels.reshape(self.size, self.size, -1)).permute(2, 0, 1).float()
        target = {
            "boxes": torch.from_numpy(row.boxes) * self.size,
            "labels": torch.from_numpy(row.labels),
            "crowd": torch.from_numpy(row.crowd),
        }
        return (x / 255 - self.mean) / self.std, target


def boxed_images(annotations: Path, images: Path, cfg: DataConfig) -> Data:
    """Images with boxes, split into calibration and evaluation.

    Args:
        annotations: COCO's JSON file, or a folder of YOLO text files (class cx cy w h, as fractions; or polygons or points, of
            which the box counts).
        images: Folder of the images.
        cfg: ``size`` is needed; ``mean`` and ``std`` default to 0 and 1.

    Raises:
        ConfigError: something is missing or malformed; the message names the file and the line.
    """
    if cfg.yolo is not None:
        need_folders(yolo=annotations)
    if annotations.is_dir():
        rows = [_yolo_row(f, annotations / f"{f.stem}.txt") for f in image_files(images)]
        names: dict[int, str] = {}  # search.data.class_names looks for them beside the labels
    else:
        rows, names = _coco_rows(annotations, images)
    return boxed(rows, names, images, cfg)


def boxed(
    rows: Sequence[LabelledBoxes], names: dict[int, str], images: Path, cfg: DataConfig
) -> Data:
    """Rows with boxes, split into calibration and evaluation; errors as for `boxed_images`."""
    if not isinstance(cfg.size, int):
        found = "missing size" if cfg.size is None else f"size {list(cfg.size)}"
        raise ConfigError(
            f"data: {found}: boxes need the side in pixels of the square the network reads"
        )
    need_folders(images=images)
    if not rows:
        raise ConfigError(f"data: {images}: holds no images")
    files = [row.file for row in rows]
    calibration, evaluation = (
        [rows[i] for i in readable(images, part, files)] for part in split(images, len(rows), cfg)
    )
    mean, std = cfg.mean or (0.0, 0.0, 0.0), cfg.std or (1.0, 1.0, 1.0)
    pairs = BoxedImages(calibration, cfg.size, mean, std)
    return Data(Inputs(pairs), BoxedImages(evaluation, cfg.size, mean, std), names=names)


def _yolo_row(image: Path, text: Path) -> LabelledBoxes:
    """An image without a text file has no objects, as YOLO's tools have it."""
    rows: list[list[float]] = []
    try:
        lines = text.read_text(encoding="utf-8").splitlines() if text.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.yolo: cannot be read: {text}: {reason(error)}") from error
    for number, line in enumerate(lines, 1):
        try:
            numbers = [float(word) for word in line.split()]
        except ValueError as error:
            raise ConfigError(f"data.yolo: {text.name}:{number}: {error}") from error
        if not numbers:
            continue
        if len(numbers) > 6:
            numbers = _box_of(numbers)
        if (
            len(numbers) != 5
            or not all(map(math.isfinite, numbers))
            or numbers[0] < 0
            or numbers[0] != int(numbers[0])
            or max(map(abs, numbers[1:])) > LARGEST
        ):
            fact = f"expected class cx cy w h as fractions of the image: {line.strip()!r}"
            raise ConfigError(f"data.yolo: {text.name}:{number}: {fact}")
        rows.append(numbers)
    table = np.array(rows, np.float32).reshape(-1, 5)
    centre, half = table[:, 1:3], table[:, 3:5] / 2
    return LabelledBoxes(
        image,
        np.concatenate([centre - half, centre + half], 1).astype(np.float32),
        table[:, 0].astype(np.int64),
        np.zeros(len(table), bool),
    )


def _box_of(numbers: list[float]) -> list[float]:
    """The box of a polygon (class x1 y1 x2 y2 ..., an odd count), or that in front of the points of a pose."""
    if len(numbers) % 2 == 0:
        return numbers[:5]
    x, y = numbers[1::2], numbers[2::2]
    center = [(min(x) + max(x)) / 2, (min(y) + max(y)) / 2]
    return [numbers[0], *center, max(x) - min(x), max(y) - min(y)]


def _coco_rows(annotations: Path, images: Path) -> tuple[list[LabelledBoxes], dict[int, str]]:
    """The images, and names of the classes by index."""
    try:
        content = json.loads(annotations.read_text())
        listed, objects, categories = (
            content[key] for key in ("images", "annotations", "categories")
        )
        number = {c["id"]: i for i, c in enumerate(sorted(categories, key=lambda c: c["id"]))}
        by_image: dict[Any, list[Any]] = {}
        for entry in objects:
            by_image.setdefault(entry["image_id"], []).append(entry)
        names = {number[c["id"]]: str(c["name"]) for c in categories if "name" in c}
        return [_coco_row(i, by_image.get(i["id"], []), number, images) for i in listed], names
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.coco: cannot be read: {annotations}: {reason(error)}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"data.coco: {annotations.name}: not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        fact = f"not COCO's format: {type(error).__name__}: {error}"
        raise ConfigError(f"data.coco: {annotations.name}: {fact}") from error


def _coco_row(
    image: dict[str, Any], objects: list[Any], number: dict[Any, int], images: Path
) -> LabelledBoxes:
    for found in objects:
        if len(found["bbox"]) != 4 or not all(math.isfinite(v) for v in found["bbox"]):
            raise ValueError(f"{image['file_name']}: bbox is not x, y, w, h: {found['bbox']}")
        if found["category_id"] not in number:
            listed = f"not among the categories: {found['category_id']!r}"
            raise ValueError(f"{image['file_name']}: category_id {listed}")
    if not (image["width"] > 0 and image["height"] > 0):
        shape = f"{image['width']} x {image['height']}"
        raise ValueError(f"{image['file_name']}: width and height must be above 0: {shape}")
    xywh = np.array([o["bbox"] for o in objects], np.float32).reshape(-1, 4)
    size = np.array([image["width"], image["height"]], np.float32)
    low = xywh[:, :2] / size
    return LabelledBoxes(
        images / image["file_name"],
        np.concatenate([low, low + xywh[:, 2:] / size], 1),
        np.array([number[o["category_id"]] for o in objects], np.int64),
        np.array([bool(o.get("iscrowd", 0)) for o in objects], bool),
    )
