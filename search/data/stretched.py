"""An image stretched to what the network reads, for labels that are stretched with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from search.config.schema import ConfigError, DataConfig
from search.data.images import Data, Inputs, readable, split

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Frame:
    """(height, width) that the network reads, and its normalization."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def read(self, file: Path, part: Box | None = None) -> tuple[Tensor, tuple[int, int]]:
        """The input (C, height, width), of a part (x1, y1, x2, y2 in pixels) or the whole, and (width, height) of the file."""
        height, width = self.size
        with Image.open(file) as image:
            whole = image.size
            pixels = np.array(
                image.convert("L" if len(self.mean) == 1 else "RGB").resize(
                    (width, height), Image.Resampling.BILINEAR, part
                )
            )
        x = torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1).float()
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x / 255 - mean) / std, whole


def frame_of(cfg: DataConfig, what: str) -> Frame:
    """What ``size``, ``mean`` and ``std`` say; the last two default to 0 and 1.

    Raises:
        ConfigError: ``size`` is missing.
    """
    if cfg.size is None:
        raise ConfigError(
            f"data: missing size: {what} are stretched with their images to the size the network reads"
        )
    size = (cfg.size, cfg.size) if isinstance(cfg.size, int) else (cfg.size[0], cfg.size[1])
    return Frame(size, cfg.mean or (0.0, 0.0, 0.0), cfg.std or (1.0, 1.0, 1.0))


class Labelled:
    """(input, target) pairs that a function makes when they are asked for."""

    def __init__(self, rows: Sequence[Any], made: Callable[[Any], tuple[Tensor, Any]]) -> None:
        self.rows, self.made = rows, made

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.made(self.rows[index])


def divided(
    source: Path,
    files: Sequence[Path],
    rows: Sequence[Any],
    made: Callable[[Any], tuple[Tensor, Any]],
    cfg: DataConfig,
    names: dict[int, str],
) -> Data:
    """Rows split into calibration and evaluation, without those whose file cannot be read.

    Raises:
        ConfigError: there are too few, or too many cannot be read.
    """
    if not rows:
        raise ConfigError(f"data: {source}: lists no labelled images")
    calibration, evaluation = (
        [rows[i] for i in readable(source, part, files)] for part in split(source, len(rows), cfg)
    )
    return Data(Inputs(Labelled(calibration, made)), Labelled(evaluation, made), names=names)
