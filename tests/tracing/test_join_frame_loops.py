"""Loops over frames: one call on all frames, with the same answers, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import cost, trace
from rewriter.graph.lookup import layer_name, layers, module_of
from tests.networks import randomise

FRAMES = 4


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU6())
        self.dw = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pw = nn.Conv2d(6, 6, 1)
        self.mix = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.cat([x, x + self.pw(torch.relu(self.dw(x)))], 1)
        return self.mix(y).mean((2, 3))


class Video(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Linear(5, 1)
        self.rnn, self.cell = nn.GRU(5, 5, batch_first=True), nn.GRUCell(5, 5)
        self.slow, self.lstm = nn.GRU(5, 5), nn.LSTMCell(5, 5)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def by_reshape(m: Any, x: Tensor) -> Tensor:
    n, t = x.shape[:2]
    return m.head(m.rnn(m.trunk(x.flatten(0, 1)).view(n, t, -1))[0]).squeeze(-1)


def by_loop(m: Any, x: Tensor) -> Tensor:
    return m.head(m.rnn(torch.stack([m.trunk(x[:, t]) for t in range(x.shape[1])], 1))[0])


def by_unbind(m: Any, x: Tensor) -> Tensor:
    return m.head(m.slow(torch.stack([m.trunk(f) for f in x.unbind(1)]))[0]).transpose(0, 1)


def by_cat(m: Any, x: Tensor) -> Tensor:
    frames = [m.trunk(x[:, t]).view(x.shape[0], 1, -1) for t in range(x.shape[1])]
    return m.head(m.rnn(torch.cat(frames, dim=1))[0])


def by_cell(m: Any, x: Tensor) -> Tensor:
    h, scores = torch.zeros(x.shape[0], 5), []
    for t in range(x.shape[1]):
        h = m.cell(m.trunk(x[:, t]), h)
        scores.append(m.head(h))
    return torch.cat(scores, 1)


def by_lstm_cell(m: Any, x: Tensor) -> Tensor:
    state, scores = None, []
    for t in range(x.shape[1]):
        state = m.lstm(m.trunk(x[:, t]), state)
        scores.append(m.head(state[0])[:, 0])
    return torch.stack(scores, 1)


def of_time_first(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.head(m.trunk(frame)) for frame in x.transpose(0, 1)], -1)


RUNS = [by_reshape, by_loop, by_unbind, by_cat, by_cell, by_lstm_cell, of_time_first]


@pytest.mark.parametrize("run", RUNS, ids=lambda r: r.__name__)
def test_frames_are_joined_into_one_call(run: Callable[..., Any]) -> None:
    model = randomise(Video(run))
    x = torch.randn(3, FRAMES, 3, 12, 10)
    gm = trace(model, x[:2])
    names = [layer_name(n) for n in layers(gm)]
    assert names == ["trunk.stem.0", "trunk.dw", "trunk.pw", "trunk.mix", "head"]
    (stem, *_) = layers(gm)
    assert stem.meta["shape"][0] == FRAMES  # of one sequence
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5)
    frame = cost(trace(model.trunk, x[:2, 0])).macs
    assert cost(gm).macs >= FRAMES * frame


def test_names_do_not_depend_on_the_number_of_frames() -> None:
    model = randomise(Video(by_cell))
    found = []
    for frames in (2, 5):
        gm = trace(model, torch.randn(2, frames, 3, 12, 10))
        found.append([n.name for n in layers(gm)])
    assert found[0] == found[1]


def test_what_feeds_the_next_step_stays_unrolled() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h, scores = torch.zeros(x.shape[0], 5), []
        for t in range(x.shape[1]):
            h = m.cell(m.trunk(x[:, t]), h)
            scores.append(m.head(h))
            h = h + scores[-1]
        return torch.cat(scores, 1)

    model = randomise(Video(run))
    x = torch.randn(3, FRAMES, 3, 12, 10)
    gm = trace(model, x[:2])
    names = [layer_name(n).rsplit("_", 1)[0] for n in layers(gm)]
    assert names.count("trunk.dw") == 1
    assert sum(n.startswith("head") for n in names) == FRAMES
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_operation_across_the_batch_is_not_joined() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        frames = [m.trunk(x[:, t]) for t in range(x.shape[1])]
        return torch.stack([m.head(f - f.mean(0, keepdim=True)) for f in frames], 1)

    model = randomise(Video(run))
    x = torch.randn(5, FRAMES, 3, 12, 10)
    gm = trace(model, x[:2])
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_module_shared_by_parts_of_an_image_is_not_taken_for_frames() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x[:, :3]) + self.conv(x[:, 3:])

    gm = trace(randomise(Halves()), torch.randn(2, 6, 8, 7))
    one, other = layers(gm)
    assert module_of(gm, one) is not module_of(gm, other)
