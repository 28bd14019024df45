from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewriter.rules.fuse_expand import FuseExpand
from tests.rules import check

RULE = FuseExpand()
SHAPE = (4, 13, 10)
SETTINGS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": 2, "padding": (0, 2)},
    {"kernel_size": (2, 3), "dilation": 2, "bias": False},
]


def block(act: nn.Module, first: nn.Module | None = None, **kw: Any) -> nn.Module:
    depthwise = nn.Conv2d(6, 6, groups=6, **kw)
    return nn.Sequential(first or nn.Conv2d(4, 6, 1), act, depthwise, nn.ReLU())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("act", [nn.ReLU6(), nn.SiLU(), nn.Identity()])
def test_shapes_are_kept(setting: dict[str, Any], act: nn.Module) -> None:
    new = check.rewrites(RULE, block(act, **setting), SHAPE)
    assert check.layer_count(new) == 1


@pytest.mark.parametrize("setting", SETTINGS[1:])
def test_where_all_is_linear_the_start_is_exact(setting: dict[str, Any]) -> None:
    setting = {**setting, "padding": 0}  # a bias before a padded convolution is no bias behind it
    gm = check.graph_of(check.randomise(block(nn.Identity(), **setting)), SHAPE)
    new = check.rewritten_by_plan(gm, "fuse_expand@_0")
    x = check.inputs(SHAPE)
    torch.testing.assert_close(new(x), gm(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (block(nn.ReLU(), kernel_size=3, padding=1, padding_mode="circular"), "padding mode"),
        (
            nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 12, 3, groups=6)),
            "depth multiplier is 2",
        ),
    ],
)
def test_refuses(model: nn.Module, reason: str) -> None:
    check.refuses(RULE, model, reason, SHAPE)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).relu()
        return self.b(y) + y


def test_refuses_an_expansion_that_is_read_twice() -> None:
    check.refuses(RULE, Twice(), "is read by 2 nodes", SHAPE)


@pytest.mark.parametrize(
    "first",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 1, stride=2),
        nn.Conv2d(4, 6, 1, padding=1),
        nn.Conv2d(4, 6, 1, groups=2),
    ],
)
def test_ignores_what_is_no_pointwise_convolution(first: nn.Module) -> None:
    check.ignores(RULE, block(nn.ReLU(), first, kernel_size=3), SHAPE)


def test_ignores_other_readers() -> None:
    check.ignores(RULE, nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3)), SHAPE)
