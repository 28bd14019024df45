from __future__ import annotations

import pytest
import torch
from torch import nn

from rewriter import cost, rewrite
from rewriter.plan import Plan
from rewriter.rules.densify_depthwise import DensifyDepthwise
from tests.rules import check

RULE = DensifyDepthwise(4)
SHAPE = (8, 13, 10)


@pytest.mark.parametrize(
    "setting",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": 2, "bias": False},
        {"kernel_size": 3, "dilation": (1, 2), "padding": "same"},
    ],
)
def test_it_starts_as_the_same_function(setting: dict[str, object]) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, groups=8, **setting), nn.ReLU())  # type: ignore[arg-type]
    gm = check.graph_of(check.randomise(model), SHAPE)
    (site,) = check.sites_of(RULE, gm)
    new = check.check_site(RULE, gm, site, SHAPE)
    x = check.inputs(SHAPE)
    torch.testing.assert_close(new(x), gm(x), rtol=1e-9, atol=1e-9)


def test_macs_grow_by_the_size_of_the_groups() -> None:
    gm = check.graph_of(
        check.randomise(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))), SHAPE
    ).float()
    new = rewrite(gm, Plan.parse("densify_depthwise_4@_0"))
    assert cost(new).macs == 4 * cost(gm).macs


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Conv2d(6, 6, 3, groups=6), "6 channels are no multiple of 4"),
        (nn.Conv2d(8, 16, 3, groups=8), "depth multiplier is 2"),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="replicate"), "padding mode"),
    ],
)
def test_refuses(model: nn.Conv2d, reason: str) -> None:
    check.refuses(RULE, nn.Sequential(model), reason, (model.in_channels, 9, 7))


def test_ignores_grouped_and_dense_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1))
    check.ignores(RULE, model, SHAPE)
