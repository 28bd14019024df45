from __future__ import annotations

import pytest
import torch
from torch import nn

from rewriter import Plan, rewrite
from rewriter.graph.lookup import find, module_of
from rewriter.rules.absorb_bias import AbsorbBias
from tests.rules import check

RULE = AbsorbBias()
SHAPE = (3, 9, 8)


def raised(
    act: nn.Module, reader: nn.Module, bias: float = 9.0, middle: nn.Module | None = None
) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), act, *([middle] if middle else []), reader)
    check.randomise(net)
    with torch.no_grad():
        net[0].bias[:4] += bias
    return net


def exact(net: nn.Module) -> None:
    gm = check.graph_of(net, SHAPE)
    (site,) = RULE.match(gm)
    assert not site.blocked
    new = rewrite(gm, Plan.parse("absorb_bias@model"))
    x = check.inputs(SHAPE)
    torch.testing.assert_close(new(x), gm(x), rtol=1e-9, atol=1e-9)
    before, after = (float(find(g, "_1").meta["channel_range"][1][:4].max()) for g in (gm, new))
    assert after < 0.9 * before
    assert module_of(new, find(new, "_2")).bias is not None


@pytest.mark.parametrize(
    "reader",
    [
        nn.Conv2d(6, 4, 1, bias=False),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(6, 4, (2, 3), groups=2, stride=2),
    ],
)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(6), nn.Hardtanh(0, 99.0)])
def test_is_exact_before_layers_without_padding(act: nn.Module, reader: nn.Module) -> None:
    exact(raised(act, reader))


@pytest.mark.parametrize(
    "net",
    [
        raised(nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)),
        raised(nn.ReLU(), nn.Conv2d(6, 4, 3, padding="same")),
        raised(nn.SiLU(), nn.Conv2d(6, 4, 1)),
        raised(nn.ReLU(), nn.Conv2d(6, 4, 1), bias=-3.0),
        raised(nn.ReLU(), nn.Conv2d(6, 4, 1), middle=nn.MaxPool2d(2)),
    ],
)
def test_refuses_where_the_constant_would_not_arrive(net: nn.Module) -> None:
    gm = check.graph_of(net, SHAPE)
    (site,) = RULE.match(gm)
    assert "no channel stays above zero" in site.blocked


def test_a_channel_at_the_cap_is_left_alone() -> None:
    net = raised(nn.ReLU6(), nn.Conv2d(6, 4, 1), bias=9.0)
    gm = check.graph_of(net, SHAPE)
    (site,) = RULE.match(gm)
    assert site.blocked
