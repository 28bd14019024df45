"""Built-in video data: a table of labeled frames in a folder for each sequence, or an array."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from search.config.schema import ConfigError, DataConfig
from search.data.images import Arrays, Data, Preprocessing, read_archive, readable, split

IGNORED = -1  # label of a frame that nobody labeled


@dataclass(frozen=True)
class Clip:
    """T frames that follow each other, and their labels; no labels where there are none."""

    frames: tuple[Path, ...]
    labels: tuple[int, ...] | None


class Clips:
    """Clips read when asked for: (input (T, C, H, W), labels (T,)) pairs, or inputs without labels."""

    def __init__(self, clips: Sequence[Clip], transform: Callable[[Image.Image], Tensor]) -> None:
        self.clips, self.transform = clips, transform

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Any:
        clip = self.clips[index]
        frames: list[Tensor] = []
        for path in clip.frames:
            with Image.open(path) as image:
                frames.append(self.transform(image))
        x = torch.stack(frames)
        return x if clip.labels is None else (x, torch.tensor(clip.labels))


def frame_table(table: Path, images: Path, cfg: DataConfig, preprocessing: Preprocessing) -> Data:
    """A CSV file with the columns ``file`` and, where there are labels, ``label`` (0, 1 or empty) for each frame.

    The frames of a sequence lie in one folder of their own, or share a value in the column ``sequence``; they follow
    each other in the order of the table. A sequence is cut into clips of ``data.frames`` frames; an incomplete last
    one is left out. Clips of one sequence are on the same side of the split.

    Raises:
        ConfigError: the table is missing or malformed, or there are too few sequences.
    """
    rows = _rows(table)
    if not rows:
        raise ConfigError(f"data.csv: {table.name}: lists no frames")
    sequences: dict[str, list[tuple[Path, int]]] = {}
    labeled = "label" in rows[0][1]
    for line, row in rows:
        path = images / row["file"]
        name = row.get("sequence") or str(Path(row["file"]).parent)
        sequences.setdefault(name, []).append((path, _label(table, line, row)))
    missing = [p for found in sequences.values() for p, _ in found if not p.is_file()]
    if missing:
        raise ConfigError(f"data.csv: {len(missing)} frames are missing, such as {missing[0]}")
    files = [p for found in sequences.values() for p, _ in found]
    broken = set(range(len(files))) - set(readable(table, np.arange(len(files)), files))
    holes = {files[i] for i in broken}
    length = cfg.frames or min((len(s) for s in sequences.values()), default=0)
    found = [_clips(s, length, labeled) for s in sequences.values()]
    clips = [[c for c in clip if not holes.intersection(c.frames)] for clip in found]
    parts = split(table, len(clips), cfg)
    chosen = [[clip for i in part for clip in clips[i]] for part in parts]
    if not all(chosen):
        longest = max(map(len, sequences.values()))
        raise ConfigError(f"data.frames: {length}: too long, the longest sequence has {longest}")
    transform = preprocessing.transform()
    unlabeled = [Clip(c.frames, None) for c in chosen[0]]
    training = Clips(chosen[0], transform) if labeled else None
    return Data(Clips(unlabeled, transform), Clips(chosen[1], transform), training)


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            columns = list(reader.fieldnames or [])
            rows = list(enumerate(reader, start=2))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"data.csv: cannot be read: {table}: {error}") from error
    if "file" not in columns:
        raise ConfigError(f"data.csv: {table.name}:1: no column file; columns: {columns}")
    empty = next((line for line, row in rows if not row["file"]), None)
    if empty is not None:
        raise ConfigError(f"data.csv: {table.name}:{empty}: no file name")
    return rows


def _label(table: Path, line: int, row: dict[str, str]) -> int:
    text = (row.get("label") or "").strip()
    if text not in ("", "0", "1"):
        raise ConfigError(f"data.csv: {table.name}:{line}: label is not 0, 1 or empty: {text!r}")
    return int(text) if text else IGNORED


def _clips(frames: Sequence[tuple[Path, int]], length: int, labeled: bool) -> list[Clip]:
    found: list[Clip] = []
    for start in range(0, len(frames) - length + 1, max(length, 1)):
        part = frames[start : start + length]
        labels = tuple(label for _, label in part) if labeled else None
        found.append(Clip(tuple(path for path, _ in part), labels))
    return found


def sequence_arrays(
    archive: Path, cfg: DataConfig, preprocessing: Callable[[], Preprocessing]
) -> Data:
    """An ``.npz`` of ``x`` and, where there are labels, ``y``, (N, T) of 0, 1 or -1 (left out).

    Floating ``x``, (N, T, C, H, W), is what the network reads; uint8 ``x``, (N, T, H, W, C), are frames.

    Raises:
        ConfigError: the archive is missing, or its arrays have other names, types or shapes.
    """
    x, y = read_archive(archive)
    if y is not None and (y.shape != x.shape[:2] or y.dtype.kind not in "iu"):
        wanted = f"{x.shape[:2]} integers"
        raise ConfigError(f"data.npz: {archive.name}: y must be {wanted}: {y.dtype} {y.shape}")
    transform = _transform(archive, x, preprocessing)
    if cfg.frames is not None:
        x, y = x[:, : cfg.frames], None if y is None else y[:, : cfg.frames]
    calibration, evaluation = split(archive, len(x), cfg)
    labels: Any = None if y is None else torch.from_numpy(y.astype(np.int64))
    first, rest = Arrays(x[calibration], None, transform), x[evaluation]
    if labels is None:
        return Data(first, Arrays(rest, None, transform))
    training = Arrays(x[calibration], labels[calibration], transform)
    return Data(first, Arrays(rest, labels[evaluation], transform), training)


def _transform(
    archive: Path, x: NDArray[Any], preprocessing: Callable[[], Preprocessing]
) -> Callable[[NDArray[Any]], Tensor]:
    if x.dtype.kind == "f" and x.ndim == 5:
        if not np.isfinite(x).all():
            raise ConfigError(f"data.npz: {archive.name}: x has values that are not finite")
        return lambda frames: torch.from_numpy(frames.astype(np.float32))
    if x.dtype == np.uint8 and x.ndim == 5 and x.shape[4] in (1, 3):
        of_image = preprocessing().transform()
        flat = x.shape[4] == 1
        return lambda frames: torch.stack(
            [of_image(Image.fromarray(f[..., 0] if flat else f)) for f in frames]
        )
    kind = f"{x.dtype} of shape {x.shape}"
    raise ConfigError(
        f"data.npz: {archive.name}: x must be float (N, T, C, H, W) or uint8 (N, T, H, W, C): {kind}"
    )
