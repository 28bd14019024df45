"""What an error in a channel counts, against noise that is really sent through the layers; and which groups are joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter import quantize, rewrite, simulate, target, trace
from rewriter.graph.channel_ranges import profile
from rewriter.graph.lookup import module_of
from rewriter.plan import Plan
from rewriter.surgery.channel_component import (
    Component,
    component_at,
    importance,
    joined_values,
)
from tests.rules import check

SHAPE = (3, 12, 12)


def component(model: nn.Module) -> tuple[fx.GraphModule, Component]:
    """The component of the first layer, in a graph without known ranges."""
    gm = check.graph_of(check.spread(check.randomise(model)), SHAPE)
    for node in gm.graph.nodes:
        node.meta.pop("channel_range", None)
    first = next(n for n in gm.graph.nodes if n.op == "call_module")
    found = component_at(gm, first.name)
    assert found is not None
    return gm, found


def from_first_layer_on(gm: fx.GraphModule, value: Tensor) -> Tensor:
    """What the layers behind the first one make of its output, for a chain of modules."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_module"]
    for node in nodes[1:]:
        value = module_of(gm, node)(value)
    return value


@pytest.mark.parametrize(
    "between",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(5, 5, (2, 3), groups=5, bias=False),
    ],
    ids=["pool2", "pool3", "global", "depthwise"],
)
def test_the_importance_of_a_channel_is_the_noise_that_arrives(between: nn.Module) -> None:
    """White noise in one channel; its power behind the reader, summed over the outputs."""
    gm, found = component(nn.Sequential(nn.Conv2d(3, 5, 1), between, nn.Conv2d(5, 4, 1)))
    entry = found.entries[0]
    predicted = importance(gm, found)[entry]
    gm = gm.double()
    generator = torch.Generator().manual_seed(0)
    for c in range(5):
        noise = torch.zeros(6000, 5, *SHAPE[1:], dtype=torch.float64)
        noise[:, c] = torch.randn(noise[:, c].shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            silent = from_first_layer_on(gm, torch.zeros(1, 5, *SHAPE[1:], dtype=torch.float64))
            made = from_first_layer_on(gm, noise) - silent
        middle = made[..., made.shape[-2] // 2, made.shape[-1] // 2]  # far from any padding
        measured = float(middle.square().sum(1).mean())
        assert float(predicted[c]) == pytest.approx(measured, rel=0.1)


def uneven_then(gains: Callable[[Tensor], Tensor], outputs: int) -> tuple[fx.GraphModule, Tensor]:
    """Uneven channels, a depthwise layer that multiplies each by ``gains`` of it, a pointwise one."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, outputs, 1)
    )
    size = torch.tensor([1.0, 1, 1, 1, 60, 60, 60, 60])
    with torch.no_grad():
        net[0].weight *= size.view(-1, 1, 1, 1)
        net[0].bias *= size
        net[2].weight *= gains(size).view(-1, 1, 1, 1)
        net[2].bias.zero_()
    x = torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(1))
    gm = trace(net.eval(), x[:2])
    profile(gm, [x])
    return gm, x


@pytest.mark.parametrize(
    ("gains", "outputs", "joined"),
    [(lambda size: 1 / size, 24, True), (torch.ones_like, 2, False)],
    ids=["ranges made alike", "ranges left apart"],
)
def test_groups_are_joined_where_that_does_less_damage(
    gains: Callable[[Tensor], Tensor], outputs: int, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other choice is forced upon the rule, and int8 is simulated for both."""
    gm, x = uneven_then(gains, outputs)
    found = component_at(gm, "_0")
    assert found is not None
    depthwise = found.inside[-1]
    chosen = joined_values(gm, found, 2)
    assert chosen == ({depthwise} if joined else set())

    def hurt(names: set[str]) -> float:
        monkeypatch.setattr(
            "rewriter.rules.split_range.joined_values",
            lambda graph, part, groups: {v for _, v in part.exits if v.name in names},
        )
        new = rewrite(gm, Plan.parse("split_range_2@_0"))
        with torch.no_grad():
            made = simulate(quantize(new, target("onnxruntime"), [x]))(x)
            return float((made - gm(x)).square().mean())

    other = {depthwise.name} if not joined else set[str]()
    assert hurt({n.name for n in chosen}) < hurt(other)


def test_an_error_counts_relative_to_the_power_of_what_the_reader_makes() -> None:
    gm, found = component(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)))
    (entry,) = found.entries
    before = importance(gm, found)[entry]
    ((reader, _),) = found.exits
    reader.meta["channel_range"] = (torch.zeros(4), torch.full((4,), 3.0))
    torch.testing.assert_close(importance(gm, found)[entry], before / 9)
