from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from rewriter import Plan, Step, find_sites, profile, target, trace
from rewriter.errors import RewriteError
from rewriter.plan import rewrite
from search.strategy.space import make_space, saves
from search.strategy.step_conflicts import clashes


class Blocks(nn.Module):
    """A stem and two blocks of expansion, depthwise and pointwise convolutions, with uneven channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.expand = nn.ModuleList(nn.Conv2d(8, 16, 1) for _ in range(2))
        self.dw = nn.ModuleList(nn.Conv2d(16, 16, 3, 1, 1, groups=16) for _ in range(2))
        self.pw = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(2))
        for m in (self.stem, *self.expand, *self.pw):
            m.weight.data[:2] *= 60

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for expand, dw, pw in zip(self.expand, self.dw, self.pw, strict=True):
            x = pw(dw(expand(x).relu()).relu())
        return x.mean((2, 3))


@pytest.fixture(scope="module", params=["onnxruntime", "qnn"])
def gm(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    gm = trace(Blocks().eval(), torch.randn(2, 3, 12, 12))
    gm.meta["scheme"] = target(request.param)
    profile(gm, [torch.randn(4, 3, 12, 12)])
    return gm


def carried_out(gm: Any, plan: Plan) -> bool:
    try:
        rewrite(gm, plan)
    except RewriteError:
        return False
    return True


@pytest.mark.slow
def test_the_clashes_are_the_pairs_that_cannot_be_carried_out(gm: Any) -> None:
    sites = [s for s in find_sites(gm) if not s.blocked and not saves(s)]
    found = {frozenset(pair) for pair in clashes(gm, sites)}
    steps = [Step(s.rule, s.anchor) for s in sites]
    splits = [s for s in steps if s.rule.startswith("split_")]
    replacing = [s for s in steps if s.rule in ("replace_block", "fuse_expand", "merge_separable",
                                                "densify_depthwise_4", "densify_depthwise_16")]  # fmt: skip
    assert splits
    assert replacing
    kept = [s for s in steps if s.rule in ("keep_float", "keep_int16")]
    pairs = [(a, b) for a in replacing for b in splits]
    pairs += [(a, b) for a in splits for b in kept if a.anchor == b.anchor]
    refused = {frozenset(pair) for pair in pairs if not carried_out(gm, Plan(pair))}
    assert found == refused
    rules = {" ".join(sorted(s.rule for s in pair)) for pair in found}
    assert rules >= {"replace_block split_range_2", "keep_float split_head_2"}
    # of a split head nothing is stored in int8 any more
    assert ("keep_int16 split_head_2" in rules) == (gm.meta["scheme"].wide is not None)


def test_what_is_thinned_is_not_replaced_and_can_be_split(gm: Any) -> None:
    sites = [s for s in find_sites(gm) if not s.blocked]
    found = {frozenset(pair) for pair in clashes(gm, sites)}
    thin = [s for s in sites if saves(s)]
    assert thin
    for site in thin:
        for other in sites:
            if other.rule in ("replace_block", "fuse_expand", "densify_depthwise_4"):
                together = set(site.nodes) & set(other.nodes)
                assert (frozenset({Step.at(site), Step.at(other)}) in found) == bool(together)
            elif other.rule.startswith("split_range"):
                assert carried_out(gm, Plan((Step.at(site), Step.at(other)))), (site, other)


@pytest.mark.slow
def test_plans_of_the_space_can_be_carried_out(gm: Any) -> None:
    # whether it finds something depends on what equalization has made of the channels
    sites = [s for s in find_sites(gm) if not s.blocked and s.rule != "absorb_bias"]
    loose = make_space(sites, {}, lambda step: 0, 1)
    space = make_space(sites, {}, lambda step: 0, 1, clashes=lambda kept: clashes(gm, kept))
    draw = random.Random(0)
    choices = [{s: draw.choice(r) for s, r in space.choices.items()} for _ in range(12)]
    assert all(carried_out(gm, space.plan(choice)) for choice in choices)
    assert not all(carried_out(gm, loose.plan(choice)) for choice in choices)
    assert len({str(space.plan(c)) for c in choices}) == len(choices)
    assert all(a != b for a, b in pairwise(choices))
