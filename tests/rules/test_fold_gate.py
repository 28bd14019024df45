from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter import Plan, cost, rewrite, target
from rewriter.fitting.fit import fit
from rewriter.graph import facts
from rewriter.rules.fold_gate import FoldGate
from rewriter.surgery.gates import gates
from tests.rules import check

RULE = FoldGate()
SHAPE = (3, 16, 16)
SCHEME = target("onnxruntime")


class Gated(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=groups)
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.c = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        g = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.c(self.b(x * g).relu())


def steady(model: Any, share: float) -> nn.Module:
    """Random, with a gate that depends on the image by a share of what it would."""
    check.randomise(model)
    with torch.no_grad():
        model.down.bias.fill_(1.0)
        model.up.weight.mul_(share)
    return model


def test_a_steady_gate_goes() -> None:
    gm = check.graph_of(steady(Gated(), 0.05), SHAPE)
    (site,) = check.sites_of(RULE, gm)
    assert site.anchor == "down"
    assert site.readers == ("b",)
    new = check.check_site(RULE, gm, site, SHAPE)
    names = {n.name for n in new.graph.nodes}
    assert not {"down", "up", "mul"} & names
    assert cost(new.float()).macs == cost(gm.float()).macs - 2 * 8 * 2


def test_a_gate_that_is_constant_is_folded_exactly() -> None:
    gm = check.graph_of(steady(Gated(), 0.0), SHAPE)
    new = check.check_site(RULE, gm, check.sites_of(RULE, gm)[0], SHAPE)
    x = check.inputs(SHAPE)
    torch.testing.assert_close(new(x), gm(x), rtol=1e-6, atol=1e-6)


def error(gm: fx.GraphModule, new: fx.GraphModule, x: Tensor) -> float:
    with torch.no_grad():
        return float((gm(x) - new(x)).square().sum() / (gm(x) - gm(x).mean(0)).square().sum())


def test_the_reader_is_fitted() -> None:
    gm = check.graph_of(steady(Gated(), 0.3), SHAPE).float()
    x = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1))
    plan = Plan.parse("fold_gate@down")
    fits = fit(gm, plan, [x], SCHEME, distilled=False)
    assert set(fits.weights["fold_gate@down"]) == {"b.weight", "b.bias"}
    fresh = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(2))
    before = error(gm, rewrite(gm, plan), fresh)
    assert error(gm, rewrite(gm, plan, fits.weights), fresh) < before


def test_an_activation_behind_it_is_fitted_on_top() -> None:
    class Smooth(Gated):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            g = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
            return self.c(nn.functional.silu(self.b(x * g)))

    gm = check.graph_of(steady(Smooth(), 0.1), SHAPE).float()
    x = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))
    plan = Plan.parse("fold_gate@down replace_activation_relu@b")
    fits = fit(gm, plan, [x], SCHEME, distilled=False)
    assert error(gm, rewrite(gm, plan, fits.weights), x) < error(gm, rewrite(gm, plan), x)


def test_refuses_a_gate_that_varies_and_readers_with_groups() -> None:
    gm = check.graph_of(steady(Gated(2), 0.05), SHAPE)
    assert [s.blocked for s in RULE.match(gm)] == ["b has groups"]
    gm = check.graph_of(steady(Gated(), 0.05), SHAPE)
    (gated,) = gates(gm)
    facts.CHANNEL_RANGE.put(gated.gate, (torch.zeros(8), torch.linspace(0.3, 1.0, 8)))
    (site,) = RULE.match(gm)
    assert site.blocked == "the gate varies: half of its channels span 60% of the largest"


def test_ignores_a_network_without_gates() -> None:
    check.ignores(RULE, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()), SHAPE)
