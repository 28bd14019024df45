"""A user's own code: a small CNN with a GRU behind it, one planted harmful layer, and sequences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

FRAMES = 4


class SmallVideo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, 2, 1), nn.ReLU6())
        self.dw = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.ReLU())
        self.pw = nn.Conv2d(6, 10, 1)
        self.rnn = nn.GRU(10, 7, batch_first=True)
        self.score = nn.Linear(7, 1)
        with torch.no_grad():
            self.dw[0].weight[2] *= 100
            self.dw[0].bias[2] *= 100
            self.pw.weight[:, 2] /= 100
            self.rnn.weight_ih_l0 *= 20

    def forward(self, x: Tensor) -> Tensor:
        frames = self.pw(self.dw(self.stem(x.flatten(0, 1)))).mean((2, 3))
        return self.score(self.rnn(frames.unflatten(0, x.shape[:2]))[0]).squeeze(-1)


def network() -> nn.Module:
    torch.manual_seed(3)
    return SmallVideo().eval()


def data(count: int = 40) -> Any:
    """Labels are what the float network says of each frame, but for one in eight."""
    generator = torch.Generator().manual_seed(1)
    x, other = (torch.randn(n, FRAMES, 2, 12, 12, generator=generator) for n in (count, 24))
    net = network()
    with torch.no_grad():
        scores, trained = net(x), net(other)
    labels = [(s > s.median()).long() for s in (scores, trained)]
    labels[0].view(-1)[::8] ^= 1
    pairs = [TensorDataset(v, y) for v, y in zip((x, other), labels, strict=True)]
    calibration = [v.clone() for v in other[:16]]
    return SimpleNamespace(calibration=calibration, evaluation=pairs[0], training=pairs[1])
