"""A user's own code: a small network with one planted harmful layer, and data, as factories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Small(nn.Module):
    """Convolution, depthwise, pointwise, head; one channel is large, and undone."""

    def __init__(self, spread: float = 300.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6())
        self.dw = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU())
        self.pw = nn.Conv2d(8, 12, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)
        with torch.no_grad():
            self.dw[0].weight[3] *= spread
            self.dw[0].bias[3] *= spread
            self.pw.weight[:, 3] /= spread
            self.fc.weight *= 200  # logits that differ from image to image

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.pw(self.dw(self.stem(x)))).flatten(1))


def small(spread: float = 300.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Small(spread).eval()


@dataclass(frozen=True)
class Splits:
    calibration: Any
    evaluation: Any
    training: Any = None


class Unlabeled:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]


class Broken(Unlabeled):
    def __getitem__(self, index: int) -> Tensor:
        if index == 7:
            raise ZeroDivisionError("in the user's data set")
        return self.x[index]


def data(labels: bool = True, broken: bool = False, count: int = 48, seed: int = 1) -> Splits:
    """Labels are what the float network says, but for one in eight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 16, 16, generator=generator)
    calibration = Unlabeled(torch.randn(16, 3, 16, 16, generator=generator))
    if broken:
        return Splits(calibration, Broken(x))
    if not labels:
        return Splits(calibration, Unlabeled(x))
    with torch.no_grad():
        y = small()(x).argmax(1)
    y[::8] = (y[::8] + 1) % 5
    return Splits(calibration, TensorDataset(x, y))
