"""Every rule on random networks: what its contract says, whatever the network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from rewriter import RULES, Plan, PlanError, rewrite
from rewriter.rules import Site
from tests.rules import check

SHAPE = (3, 12, 9)
ON = "qnn"  # where every rule of the catalog may act
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Sigmoid,
    nn.GELU,
)


class Separable(nn.Module):
    """[1 x 1], depthwise, 1 x 1, with or without batch norm, activation, gate and skip."""

    def __init__(self, draw: st.DrawFn, inner: int, outer: int) -> None:
        super().__init__()
        wide = inner * draw(st.sampled_from([1, 2]))
        kernel = draw(st.sampled_from([3, 5, (1, 3), (3, 2)]))
        size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        same = draw(st.booleans()) and all(k % 2 for k in size)
        self.expand = nn.Conv2d(inner, wide, 1) if draw(st.booleans()) or wide != inner else None
        self.first = activation(draw, wide)
        self.depth = nn.Conv2d(
            wide,
            wide,
            kernel,
            stride=1 if same else draw(st.sampled_from([1, 2])),
            padding="same" if same else (size[0] // 2, size[1] // 2),  # no value ever vanishes
            dilation=draw(st.sampled_from([1, 2])) if same else 1,
            groups=wide,
            bias=draw(st.booleans()),
        )
        self.norm = nn.BatchNorm2d(wide) if draw(st.booleans()) else nn.Identity()
        self.second = activation(draw, wide)
        gated = draw(st.booleans())
        self.gate = (
            nn.Sequential(nn.Conv2d(wide, 2, 1), nn.ReLU(), nn.Conv2d(2, wide, 1))
            if gated
            else None
        )
        self.project = nn.Conv2d(wide, outer, 1, bias=draw(st.booleans()))
        self.skip = same and inner == outer and draw(st.booleans())

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.second(self.norm(self.depth(self.first(y))))
        if self.gate is not None:
            y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        y = self.project(y)
        return y + x if self.skip else y


class Network(nn.Module):
    """A stem, a few blocks, and a head: classes, a map, a concatenation, or decoding."""

    def __init__(self, draw: st.DrawFn) -> None:
        super().__init__()
        width = draw(st.sampled_from([4, 6, 16]))
        self.stem = nn.Conv2d(
            3, width, 3, draw(st.sampled_from([1, 2])), 1, bias=draw(st.booleans())
        )
        self.act = activation(draw, width)
        self.blocks = nn.ModuleList()
        for _ in range(draw(st.integers(1, 3))):
            outer = draw(st.sampled_from([width, 5, 8]))
            self.blocks.append(Separable(draw, width, outer))
            width = outer
        self.kind = draw(st.sampled_from(["classes", "map", "cat", "decode"]))
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if draw(st.booleans()) else nn.Identity()
        self.side = nn.Conv2d(width, 4, 1)
        self.head = (
            nn.Linear(width, 9)
            if self.kind == "classes"
            else nn.Conv2d(width + (4 if self.kind == "cat" else 0), 9, 1)
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.act(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = self.pool(x)
        if self.kind == "classes":
            return self.head(x.mean((2, 3)))
        if self.kind == "cat":
            return self.head(torch.cat([x, torch.relu(self.side(x))], 1)), x
        y = self.head(x)
        if self.kind == "decode":
            y = y.flatten(2).transpose(1, 2)
            return torch.cat([y[..., :4] * 50, y[..., 4:].sigmoid()], -1)
        return y


def activation(draw: st.DrawFn, channels: int) -> nn.Module:
    kind = draw(st.sampled_from((nn.Identity, *ACTIVATIONS)))
    return kind(draw(st.sampled_from([1, channels]))) if kind is nn.PReLU else kind()


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    model = check.randomise(Network(draw), draw(st.integers(0, 2**16)))
    return check.spread(model) if draw(st.booleans()) else model


def assert_contracts(gm: fx.GraphModule, chosen: Sequence[float] = ()) -> None:
    """Each rule alone at each of its sites, or at one of them: that at the share that is next in ``chosen``."""
    shares = itertools.cycle(chosen)
    for rule in RULES:
        found = list(rule.match(gm))
        assert all(isinstance(site, Site) and site.rule == rule.name for site in found)
        assert [rule.site_at(gm, site.anchor) for site in found] == found
        assert rule.site_at(gm, "nowhere") is None
        names = {n for site in found[:1] for n in (*site.nodes, *site.readers)}
        assert list(rule.near(gm, names)) == [s for s in found if names & {*s.nodes, *s.readers}]
        sites = [s for s in found if not s.blocked]
        if chosen and sites:
            sites = [sites[min(int(next(shares) * len(sites)), len(sites) - 1)]]
        for site in sites:
            check.check_site(rule, gm, site, SHAPE)


def assert_plan(gm: fx.GraphModule, chosen: Sequence[float], share: float) -> None:
    """A random plan is refused as a whole, or keeps what the weakest of its contracts promises."""
    contracts = {r.name: r.contract for r in RULES}
    found = [s for r in RULES for s in r.match(gm) if not s.blocked]
    sites = [s for s, c in zip(found, itertools.cycle(chosen), strict=False) if c < share]
    state = {k: v.clone() for k, v in gm.state_dict().items()}
    kept: list[str] = []
    for site in sites:
        try:  # take the step if it goes with those before it
            rewrite(gm, Plan.parse(" ".join([*kept, f"{site.rule}@{site.anchor}"])))
        except PlanError:
            continue
        kept.append(f"{site.rule}@{site.anchor}")
    x = check.inputs(SHAPE)
    new = rewrite(gm, Plan.parse(" ".join(kept)))
    assert rewrite(gm, Plan.parse(" ".join(reversed(kept)))).code == new.code
    exact = all(contracts[step.partition("@")[0]] != "approximate" for step in kept)
    for a, b in zip(check.flat(new(x)), check.flat(gm(x)), strict=True):
        assert a.shape == b.shape
        assert bool(torch.isfinite(a).all())
        if exact:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))
    check.assert_shapes(new, x)
    assert all(torch.equal(v, state[k]) for k, v in gm.state_dict().items())


CHOICES = st.lists(st.floats(0, 1), min_size=7, max_size=7)
EVERY: Any = list(HealthCheck)  # their class types them as itself
FEW = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=EVERY)
MANY = settings(max_examples=50, deadline=None, database=None, suppress_health_check=EVERY)


@FEW
@given(networks())
def test_each_rule_keeps_its_contract(model: nn.Module) -> None:
    assert_contracts(check.graph_of(model, SHAPE, ON))


@pytest.mark.slow
@FEW
@given(networks(), CHOICES)
def test_plans_of_several_rules_keep_theirs(model: nn.Module, chosen: list[float]) -> None:
    assert_plan(check.graph_of(model, SHAPE, ON), chosen, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_all_rules_on_five_hundred_networks(part: int) -> None:
    """On each network one site of every rule, and a plan of several; in ten parts."""

    @MANY
    @seed(part)
    @given(networks(), CHOICES)
    def on_each(model: nn.Module, chosen: list[float]) -> None:
        gm = check.graph_of(model, SHAPE, ON)
        assert_contracts(gm, chosen)
        assert_plan(gm, chosen, 0.15)

    on_each()
