from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewriter.rules.replace_block import ReplaceBlock
from tests.rules import check

RULE = ReplaceBlock()
SHAPE = (4, 13, 10)


def block(
    act: type[nn.Module] = nn.LeakyReLU, last: nn.Module | None = None, **kw: Any
) -> nn.Module:
    settings: dict[str, Any] = {"kernel_size": 3, **kw}
    depthwise = nn.Conv2d(6, 6, groups=6, **settings)
    return nn.Sequential(nn.Conv2d(4, 6, 1), act(), depthwise, act(), last or nn.Conv2d(6, 5, 1))


@pytest.mark.parametrize("act", [nn.LeakyReLU, nn.ReLU6, nn.SiLU, nn.Identity])
@pytest.mark.parametrize("setting", [{"padding": 1}, {"kernel_size": (1, 5), "stride": 2}])
def test_shapes_are_kept(act: type[nn.Module], setting: dict[str, Any]) -> None:
    new = check.rewrites(RULE, block(act, **setting), SHAPE)
    assert check.layer_count(new) == 1


def test_where_all_is_linear_the_start_is_exact() -> None:
    gm = check.graph_of(check.randomise(block(nn.Identity, stride=2, dilation=2)), SHAPE)
    new = check.rewritten_by_plan(gm, "replace_block@_0")
    x = check.inputs(SHAPE)
    torch.testing.assert_close(new(x), gm(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (block(padding=1, padding_mode="reflect"), "padding mode is reflect"),
        (block(last=nn.Conv2d(6, 5, 3)), "is no 1 x 1 convolution"),
        (block(last=nn.MaxPool2d(2)), "stands behind"),
    ],
)
def test_refuses(model: nn.Module, reason: str) -> None:
    check.refuses(RULE, model, reason, SHAPE)


def test_ignores_a_separable_convolution_without_expansion() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 5, 1))
    check.ignores(RULE, model, SHAPE)
