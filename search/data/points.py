"""Objects with keypoints, each cut out of its image by its box: COCO's JSON, or YOLO's pose labels.

The box is stretched to what the network reads, and its points with it: (K, 3) of x, y in pixels of the input and a
visibility, 0 where a point is not labelled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from search.config.messages import reason
from search.config.schema import ConfigError, DataConfig
from search.data.images import Data, image_files, need_folders
from search.data.stretched import Box, divided, frame_of


@dataclass(frozen=True)
class _Person:
    """A box (x1, y1, x2, y2) and points (K, 3), in pixels of the file."""

    file: Path
    box: Box
    points: NDArray[np.float64]


def coco_points(annotations: Path, images: Path, cfg: DataConfig) -> Data:
    """Every object of COCO's JSON with a labelled point, crowds left out.

    Raises:
        ConfigError: the file is missing or malformed, or no object has points.
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        files = {i["id"]: images / i["file_name"] for i in content["images"]}
        people: list[_Person] = []
        for o in content["annotations"]:
            points = np.array(o.get("keypoints", ()), np.float64).reshape(-1, 3)
            if o.get("iscrowd") or not (points[:, 2] > 0).any():
                continue
            x, y, w, h = (float(v) for v in o["bbox"])
            people.append(_Person(files[o["image_id"]], (x, y, x + w, y + h), points))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.coco: cannot be read: {annotations}: {reason(error)}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"data.coco: {annotations.name}: not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        fact = f"not COCO's format with keypoints: {type(error).__name__}: {error}"
        raise ConfigError(f"data.coco: {annotations.name}: {fact}") from error
    return _cut_out(annotations, people, cfg)


def yolo_points(labels: Path, images: Path, cfg: DataConfig) -> Data:
    """YOLO's pose labels: class cx cy w h, then x y or x y visibility of each point, as fractions.

    Raises:
        ConfigError: a folder is missing or a line malformed.
    """
    need_folders(yolo=labels, images=images)
    people: list[_Person] = []
    for image in image_files(images):
        text = labels / f"{image.stem}.txt"
        if not text.exists():
            continue
        with Image.open(image) as opened:
            scale = np.array(opened.size, np.float64)
        for number, line in enumerate(text.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                people.append(_pose(image, f"{text.name}:{number}", line, scale))
    return _cut_out(labels, people, cfg)


def _pose(image: Path, where: str, line: str, scale: NDArray[np.float64]) -> _Person:
    try:
        numbers = [float(w) for w in line.split()]
    except ValueError as error:
        raise ConfigError(f"data.yolo: {where}: {error}") from error
    rest = len(numbers) - 5
    # where both readings fit, every third number of a visibility is 0, 1 or 2
    triples = rest > 0 and rest % 3 == 0 and set(numbers[7::3]) <= {0.0, 1.0, 2.0}
    if rest < 2 or not (triples or rest % 2 == 0) or not all(map(math.isfinite, numbers)):
        raise ConfigError(
            f"data.yolo: {where}: expected class cx cy w h and points: {line.strip()[:60]!r}"
        )
    points = np.array(numbers[5:]).reshape(-1, 3 if triples else 2)
    seen = points[:, 2:] if triples else (points > 0).any(1, keepdims=True).astype(np.float64)
    center, half = np.array(numbers[1:3]), np.array(numbers[3:5]) / 2
    low, high = (center - half) * scale, (center + half) * scale
    box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
    return _Person(image, box, np.concatenate([points[:, :2] * scale, seen], 1))


def _cut_out(source: Path, people: list[_Person], cfg: DataConfig) -> Data:
    people = [p for p in people if (p.points[:, 2] > 0).any()]
    counts = {len(p.points) for p in people}
    if len(counts) > 1:
        raise ConfigError(f"data: {source.name}: objects differ in their points: {sorted(counts)}")
    flat = next((p for p in people if p.box[2] - p.box[0] < 1 or p.box[3] - p.box[1] < 1), None)
    if flat is not None:
        raise ConfigError(f"data: {flat.file.name}: a box is smaller than a pixel: {flat.box}")
    frame = frame_of(cfg, "points")

    def made(person: _Person) -> tuple[Tensor, Tensor]:
        with Image.open(person.file) as image:
            width, height = image.size
        x1, y1, x2, y2 = person.box
        part = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        x, _ = frame.read(person.file, part)
        step = np.array(
            [frame.size[1] / (part[2] - part[0]), frame.size[0] / (part[3] - part[1]), 1.0]
        )
        points = (person.points - np.array([part[0], part[1], 0.0])) * step
        return x, torch.from_numpy(points.astype(np.float32))

    return divided(source, [p.file for p in people], people, made, cfg, {})
