"""Boxes in Pascal VOC's form: an XML file for each image, with the names of its objects."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from search.config.messages import reason
from search.config.schema import ConfigError, DataConfig
from search.data.boxes import LabelledBoxes, boxed
from search.data.images import Data, need_folders


def voc_images(
    annotations: Path, images: Path, cfg: DataConfig, order: Sequence[str] = ()
) -> Data:
    """The images of a folder of XML files, split into calibration and evaluation.

    Args:
        annotations: The folder.
        images: Of the files that the XML files name.
        cfg: ``size`` is needed; ``mean`` and ``std`` default to 0 and 1.
        order: Of the classes; empty: that of the alphabet.

    Raises:
        ConfigError: a file cannot be read, or holds something else, or a class that ``order`` lacks.
    """
    need_folders(voc=annotations)
    found: list[tuple[Path, list[tuple[str, list[float], bool]]]] = []
    for file in sorted(annotations.glob("*.xml")):
        try:
            root = ET.parse(file).getroot()
            width, height = (float(_text(root, f"size/{k}")) for k in ("width", "height"))
            objects = [_object(o, width, height) for o in root.iter("object")]
            found.append((images / _text(root, "filename"), objects))
        except OSError as error:
            raise ConfigError(f"data.voc: cannot be read: {file}: {reason(error)}") from error
        except (ET.ParseError, ValueError) as error:
            raise ConfigError(f"data.voc: {file.name}: not Pascal VOC's form: {error}") from error
    seen = {name for _, objects in found for name, _, _ in objects}
    names = list(order) or sorted(seen)
    unknown = sorted(seen - set(names))
    if unknown:
        raise ConfigError(
            f"data.voc: class {unknown[0]!r}: not among data.names: {', '.join(names)}"
        )
    number = {name: i for i, name in enumerate(names)}
    rows = [
        LabelledBoxes(
            image,
            np.array([box for _, box, _ in objects], np.float32).reshape(-1, 4),
            np.array([number[name] for name, _, _ in objects], np.int64),
            np.array([hard for _, _, hard in objects], bool),
        )
        for image, objects in found
    ]
    return boxed(rows, dict(enumerate(names)), images, cfg)


def _object(o: ET.Element, width: float, height: float) -> tuple[str, list[float], bool]:
    """Name, box as fractions, and whether it is difficult, which counts neither way; pixels are counted from 1."""
    x1, y1, x2, y2 = (float(_text(o, f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
    if min(width, height) <= 0 or x2 < x1 or y2 < y1:
        raise ValueError(f"box {x1:g} {y1:g} {x2:g} {y2:g} in an image of {width:g} x {height:g}")
    box = [(x1 - 1) / width, (y1 - 1) / height, x2 / width, y2 / height]
    return _text(o, "name"), box, (o.findtext("difficult") or "0").strip() == "1"


def _text(element: ET.Element, path: str) -> str:
    found = element.findtext(path)
    if found is None or not found.strip():
        raise ValueError(f"no {path}")
    return found.strip()
