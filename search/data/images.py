"""Built-in image data: a folder, a table of files or an array, split to calibrate and evaluate."""

from __future__ import annotations

import csv
import logging
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from search.config.schema import ConfigError, DataConfig

log = logging.getLogger(__name__)

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
CALIBRATION = 300
UNREADABLE = 0.01  # more than this fraction of unreadable files is a broken data set
NAMED = 5  # files that a message names


class Samples(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Data:
    """The splits of a data set.

    Attributes:
        calibration: Inputs, float32 (C, H, W).
        evaluation: (input, target) pairs, or inputs where there are no labels.
        training: (input, target) pairs, or None.
        names: Of the classes by index, as far as they are known; pages show them.
    """

    calibration: Samples
    evaluation: Samples
    training: Samples | None = None
    names: Mapping[int, str] = field(default_factory=dict[int, str])


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes an input: resized, its center cut out, scaled to [0, 1], normalized.

    ``size`` is the side of a square, or (height, width), to which an image is then stretched whole.
    """

    size: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 0.875
    interpolation: str = "bilinear"
    crop_mode: str = "center"

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Image to float32 (C, height, width); C is 1 where there is one mean, else 3."""
        square = isinstance(self.size, int)
        sides = (self.size, self.size) if isinstance(self.size, int) else self.size
        inner: Callable[[Image.Image], Tensor] = create_transform(  # pyright: ignore[reportAssignmentType]
            input_size=(len(self.mean), *sides),
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop if square else 1.0,
            crop_mode=self.crop_mode if square else "squash",
        )
        mode = "L" if len(self.mean) == 1 else "RGB"
        return lambda image: inner(image.convert(mode))


class Inputs:
    """The inputs alone of a data set of (input, target) pairs."""

    def __init__(self, pairs: Samples) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tensor:
        return self.pairs[index][0]


class ImageFiles:
    """Images read when asked for: (input, class index) pairs, or inputs without labels."""

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[Any] | None,
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        self.files, self.labels, self.transform = files, labels, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.files[index]) as image:
            x = self.transform(image)
        return x if self.labels is None else (x, self.labels[index])


class Arrays:
    """(input, class index) pairs, or inputs without labels, of arrays in memory."""

    def __init__(
        self, x: Samples, y: Sequence[int] | None, transform: Callable[[Any], Tensor]
    ) -> None:
        self.x, self.y, self.transform = x, y, transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        x = self.transform(self.x[index])
        return x if self.y is None else (x, self.y[index])


def image_folder(root: Path, cfg: DataConfig, preprocessing: Preprocessing) -> Data:
    """A folder with a sub-folder for each class, numbered in the order of names, or a flat one.

    Raises:
        ConfigError: the folder is missing or holds too few images, or too many cannot be read.
    """
    need_folders(imagefolder=root)
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [(f, i) for i, name in enumerate(classes) for f in image_files(root / name)]
    files, labels = [f for f, _ in found], [i for _, i in found]
    if not files:
        return split_files(root, image_files(root), None, cfg, preprocessing)
    return split_files(root, files, labels, cfg, preprocessing)


def image_table(
    table: Path, images: Path, cfg: DataConfig, preprocessing: Preprocessing, task: str
) -> Data:
    """A CSV file with the columns ``file`` and, where there are labels, ``label`` (class index).

    For task ocr the column is ``text``; for regression ``label`` is a number.

    Raises:
        ConfigError: the table is missing or malformed, or too many images cannot be read.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"data.csv: cannot be read: {table}: {error}") from error
    if "file" not in columns:
        raise ConfigError(f"data.csv: {table.name}:1: no column file; columns: {columns}")
    need_folders(images=images)
    column, read = {"ocr": ("text", str), "regression": ("label", _number)}.get(
        task, ("label", int)
    )
    labels: list[Any] | None = [] if column in columns else None
    for line, row in enumerate(rows, start=2):
        if not row["file"]:
            raise ConfigError(f"data.csv: {table.name}:{line}: no file name")
        if labels is not None:
            try:
                labels.append(read(row[column]))
            except (TypeError, ValueError) as error:
                wanted = "number" if task == "regression" else "class index"
                text = f"{table.name}:{line}: label is no {wanted}: {row[column]!r}"
                raise ConfigError(f"data.csv: {text}") from error
    return split_files(table, [images / r["file"] for r in rows], labels, cfg, preprocessing)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def arrays(archive: Path, cfg: DataConfig, preprocessing: Callable[[], Preprocessing]) -> Data:
    """An ``.npz`` of ``x`` and, where there are labels, ``y`` of class indices.

    Floating ``x``, (N, C, H, W), is what the network reads; uint8 ``x``, (N, H, W) or
    (N, H, W, C), are images.

    Raises:
        ConfigError: the archive is missing, or its arrays have other names, types or shapes.
    """
    x, y = read_archive(archive)
    kind = f"{x.dtype} of shape {x.shape}"
    if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iu"):
        raise ConfigError(
            f"data.npz: {archive.name}: y must be {len(x)} integers: {y.dtype} of shape {y.shape}"
        )
    if x.dtype.kind == "f" and x.ndim == 4:
        if not np.isfinite(x).all():
            raise ConfigError(f"data.npz: {archive.name}: x has values that are not finite")
        transform = _as_input
    elif x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3))):
        of_image = preprocessing().transform()
        x = x[..., 0] if x.ndim == 4 and x.shape[3] == 1 else x
        transform = _of_pixels(of_image)
    else:
        raise ConfigError(
            f"data.npz: {archive.name}: x must be float (N, C, H, W) or uint8 (N, H, W, C): {kind}"
        )
    labels = None if y is None else y.astype(np.int64)
    calibration, evaluation = split(archive, len(x), cfg)
    return Data(
        Arrays(x[calibration], None, transform),
        Arrays(x[evaluation], None if labels is None else labels[evaluation].tolist(), transform),
    )


def read_archive(archive: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The arrays ``x`` and, where there is one, ``y`` of an ``.npz``; objects are never unpickled.

    Raises:
        ConfigError: the file is missing or damaged, or has no ``x``.
    """
    try:
        if archive.is_file() and not zipfile.is_zipfile(archive):
            raise ConfigError(f"data.npz: cannot be read: {archive}: damaged, or no .npz archive")
        with np.load(archive, allow_pickle=False) as z:
            content = {key: z[key] for key in z.files if key in ("x", "y")}
            names = list(z.files)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"data.npz: cannot be read: {archive}: {why}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"data.npz: cannot be read: {archive}: {error}") from error
    if "x" not in content:
        raise ConfigError(f"data.npz: {archive.name}: no array x; arrays: {names}")
    return content["x"], content.get("y")


def split(source: Path, count: int, cfg: DataConfig) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices that calibrate and indices that evaluate, disjoint, in an order fixed by the seed.

    Raises:
        ConfigError: nothing would be left to evaluate.
    """
    wanted = min(CALIBRATION, count // 4) if cfg.calibration is None else cfg.calibration
    if not 0 < wanted < count:
        fact = f"{count} images, {wanted} to calibrate: too few"
        raise ConfigError(f"data: {source}: {fact}; both calibration and evaluation need one")
    order = np.random.default_rng(cfg.seed).permutation(count)
    rest = order[wanted:]
    return order[:wanted], rest if cfg.evaluation is None else rest[: cfg.evaluation]


def split_files(
    source: Path,
    files: Sequence[Path],
    labels: Sequence[Any] | None,
    cfg: DataConfig,
    preprocessing: Preprocessing,
) -> Data:
    if not files:
        named = f" ({', '.join(sorted(EXTENSIONS))})" if source.is_dir() else ""
        raise ConfigError(f"data: {source}: {'holds' if named else 'lists'} no images{named}")
    parts = [readable(source, part, files) for part in split(source, len(files), cfg)]
    transform = preprocessing.transform()
    calibration, evaluation = ([files[i] for i in part] for part in parts)
    targets = None if labels is None else [labels[i] for i in parts[1]]
    return Data(
        ImageFiles(calibration, None, transform), ImageFiles(evaluation, targets, transform)
    )


def readable(source: Path, part: NDArray[np.intp], files: Sequence[Path]) -> list[int]:
    """The indices whose image can be decoded; the others are counted, named and left out."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        reasons = list(pool.map(lambda i: _unreadable(files[i]), part))
    bad = [(files[i].name, why) for i, why in zip(part, reasons, strict=True) if why]
    if bad:
        named = "; ".join(f"{name}: {why}" for name, why in bad[:NAMED])
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        fact = f"data: {source}: {len(bad)} of {len(part)} images cannot be read: {named}{more}"
        if len(bad) > UNREADABLE * len(part):
            raise ConfigError(fact)
        log.warning("%s; left out", fact)
    return [int(i) for i, why in zip(part, reasons, strict=True) if not why]


def _unreadable(file: Path) -> str:
    """Why an image cannot be decoded, or ""; a small draft of a JPEG meets its truncated end."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (32, 32))
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow reports a broken PNG as SyntaxError
        return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ""


def need_folders(**folders: Path) -> None:
    """Check that the folders of keys of ``data:`` are there.

    Raises:
        ConfigError: one is not; the message names its key.
    """
    for key, folder in folders.items():
        if not folder.is_dir():
            raise ConfigError(f"data.{key}: no such folder: {folder}")


def image_files(folder: Path) -> list[Path]:
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".") and p.is_file()
    )


def _of_pixels(of_image: Callable[[Image.Image], Tensor]) -> Callable[[NDArray[Any]], Tensor]:
    return lambda pixels: of_image(Image.fromarray(pixels))


def _as_input(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))
