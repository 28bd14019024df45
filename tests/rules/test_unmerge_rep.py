from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewriter import Plan, cost, quantize, rewrite, target
from rewriter.int8.simulate import simulate
from rewriter.rules.unmerge_rep import UnmergeRep
from tests.rules import check

RULE = UnmergeRep()
SHAPE = (8, 9, 7)


def merged(size: float = 2.0, **more: Any) -> nn.Sequential:
    """A random convolution with an identity in it, and what reads it."""
    settings: dict[str, Any] = {"kernel_size": 3, "padding": 1, **more}
    model: Any = check.randomise(nn.Sequential(nn.Conv2d(8, 8, **settings), nn.ReLU()))
    with torch.no_grad():
        height, width = model[0].kernel_size
        at = torch.arange(8)
        model[0].weight.mul_(0.2)
        model[0].weight[at, at, height // 2, width // 2] += size
    return model


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"bias": False, "padding": "same"},
        {"kernel_size": (3, 5), "padding": (1, 2)},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 1, "padding": 0},
        {"padding_mode": "reflect"},
    ],
)
def test_the_function_is_kept(setting: dict[str, Any]) -> None:
    gm = check.graph_of(merged(**setting), SHAPE)
    (site,) = check.sites_of(RULE, gm)
    new = check.check_site(RULE, gm, site, SHAPE)
    height, width = SHAPE[1:]
    assert cost(new.float()).macs == cost(gm.float()).macs + 8 * height * width


@pytest.mark.parametrize("on", ["onnxruntime", "per_tensor"])
def test_the_other_weights_have_finer_steps(on: str) -> None:
    """Planted: an identity some forty times as large as the other weights."""
    gm = check.graph_of(merged(5.0), SHAPE, on).float()
    found: list[float] = []
    for text in ("", "unmerge_rep@_0"):
        q = quantize(rewrite(gm, Plan.parse(text)), target(on), [check.inputs(SHAPE).float()])
        layer: Any = simulate(q).get_submodule("0")
        missing = (layer.weight() - layer.layer.weight).abs()
        found.append(float(missing[:, :, 0, 0].square().mean().sqrt()))
    assert found[1] < 0.2 * found[0]


def test_refuses_a_kernel_without_an_identity() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    check.refuses(RULE, model, "without an identity", SHAPE)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.Conv2d(8, 4, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, (3, 4), padding=(1, 2)),
    ],
)
def test_ignores_what_can_hold_none(layer: nn.Module) -> None:
    check.ignores(RULE, nn.Sequential(layer), SHAPE)
