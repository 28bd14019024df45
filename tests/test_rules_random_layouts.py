"""The rules for layer norms, residual trunks, re-parameterized kernels and transposed convolutions on random networks that have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter import RULES
from tests.rules import check

SHAPE = (3, 8, 12)
EVERY: Any = list(HealthCheck)  # their class types them as itself
HERE = ("scale_norm", "float_trunk", "unmerge_rep", "phase_transpose")


class Block(nn.Module):
    """A residual block on sequences or pictures: a norm and two linear layers, or a kernel with an identity in it."""

    def __init__(self, draw: st.DrawFn, width: int) -> None:
        super().__init__()
        self.kernel = draw(st.booleans())
        self.skip = draw(st.booleans())
        inner = width * draw(st.sampled_from([1, 2]))
        if self.kernel:
            self.conv = nn.Conv2d(width, width, draw(st.sampled_from([1, 3])), padding="same")
            self.act = draw(st.sampled_from([nn.ReLU, nn.SiLU]))()
        else:
            self.norm = nn.LayerNorm(width, bias=draw(st.booleans()))
            self.up = nn.Linear(width, inner, bias=draw(st.booleans()))
            self.act, self.down = nn.GELU(), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel:
            y = self.act(self.conv(x))
        else:
            y = self.norm(x.permute(0, 2, 3, 1))
            y = self.down(self.act(self.up(y))).permute(0, 3, 1, 2)
        return x + y if self.skip else y


class Layout(nn.Module):
    """A stem, blocks, and a transposed convolution in front of the output."""

    def __init__(self, draw: st.DrawFn) -> None:
        super().__init__()
        width = draw(st.sampled_from([4, 6, 8]))
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.Sequential(*(Block(draw, width) for _ in range(draw(st.integers(1, 4)))))
        kernel = draw(st.sampled_from([2, 3]))
        self.up = nn.ConvTranspose2d(width, 5, kernel, 2, bias=draw(st.booleans()))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.blocks(self.stem(x)).relu())


@st.composite
def layouts(draw: st.DrawFn) -> nn.Module:
    model = check.randomise(Layout(draw), draw(st.integers(0, 2**16)))
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.LayerNorm):
                m.weight[0] *= draw(st.sampled_from([1.0, 50.0]))
            elif isinstance(m, Block) and m.kernel:
                at, middle = torch.arange(len(m.conv.weight)), m.conv.weight.shape[2] // 2
                m.conv.weight.mul_(0.2)
                m.conv.weight[at, at, middle, middle] += draw(st.sampled_from([0.0, 3.0]))
    return model


def assert_contracts(model: nn.Module, on: str) -> set[str]:
    """Each of the rules at each of its sites; which had any."""
    gm = check.graph_of(model, SHAPE, on)
    met: set[str] = set()
    for rule in (r for r in RULES if r.name in HERE):
        found = list(rule.match(gm))
        assert [rule.site_at(gm, site.anchor) for site in found] == found
        assert rule.site_at(gm, "nowhere") is None
        names = {n for site in found[:1] for n in (*site.nodes, *site.readers)}
        assert list(rule.near(gm, names)) == [s for s in found if names & {*s.nodes, *s.readers}]
        for site in (s for s in found if not s.blocked):
            met.add(rule.name)
            check.check_site(rule, gm, site, SHAPE)
    return met


def on_networks(count: int, number: int) -> set[str]:
    met: set[str] = set()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=EVERY,
    )
    @seed(number)
    @given(layouts(), st.sampled_from(["onnxruntime", "per_tensor", "tensorrt", "tflite"]))
    def each(model: nn.Module, on: str) -> None:
        met.update(assert_contracts(model, on))

    each()
    return met


def test_each_rule_keeps_its_contract() -> None:
    on_networks(5, 0)


@pytest.mark.slow
def test_all_of_them_on_a_hundred_networks() -> None:
    assert on_networks(100, 1) == set(HERE)
