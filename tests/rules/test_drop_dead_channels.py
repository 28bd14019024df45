from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from rewriter import Plan, Step, cost, rewrite
from rewriter.graph.lookup import find, module_of
from rewriter.rules.drop_dead_channels import DropDeadChannels
from tests.rules import check

RULE = DropDeadChannels()
SHAPE = (3, 12, 9)
Mode = Literal["zeros", "reflect"]


def kill(layer: Any, *channels: int, bias: float | None = None) -> None:
    """Take the weights of some filters away; edits the layer."""
    with torch.no_grad():
        layer.weight[list(channels)] = 0
        if bias is not None:
            layer.bias[list(channels)] = bias


def graph(model: nn.Module, change: Callable[[nn.Module], None]):
    check.randomise(model)
    change(model)
    return check.graph_of(model, SHAPE)


def drops(model: nn.Module, change: Callable[[nn.Module], None], entry: str, left: int) -> None:
    """The contract holds, so many channels are left, and less is computed."""
    gm = graph(model, change)
    sites = check.sites_of(RULE, gm)
    assert [s.anchor for s in sites] == [entry]
    check.check_site(RULE, gm, sites[0], SHAPE)
    made = rewrite(gm, Plan((Step.at(sites[0]),)))
    assert len(module_of(made, find(made, entry)).weight) == left
    assert cost(made.float()).macs < cost(gm.float()).macs
    assert not check.sites_of(RULE, made)


def plain(padding: int, act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Conv2d(8, 5, 3, padding=padding))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.PReLU(8), nn.Hardswish(), nn.Sigmoid()])
def test_the_constant_moves_into_the_bias(act: nn.Module) -> None:
    drops(plain(0, act), lambda m: kill(m[0], 1, 4), "_0", 6)


def test_without_a_bias_the_channel_is_zero() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 5, 1, bias=False)
    )
    drops(model, lambda m: kill(m[0], 7), "_0", 7)


def test_behind_zero_padding_only_what_is_zero_goes() -> None:
    def change(m: nn.Module) -> None:
        kill(m[0], 1, bias=-0.5)  # 0 behind the ReLU
        kill(m[0], 4, bias=0.5)

    drops(plain(1, nn.ReLU()), change, "_0", 7)


def test_what_zero_padding_forbids_is_no_site() -> None:
    gm = graph(plain(1, nn.ReLU()), lambda m: kill(m[0], 1, 4, bias=0.5))
    assert not check.sites_of(RULE, gm)


def test_what_lives_is_no_site() -> None:
    assert not check.sites_of(RULE, graph(plain(0, nn.ReLU()), lambda m: None))


def test_what_nobody_reads_goes() -> None:
    def change(m: nn.Module) -> None:
        with torch.no_grad():
            m[2].weight[:, [2, 3]] = 0

    drops(plain(1, nn.ReLU()), change, "_0", 6)


def test_all_dead_but_one_that_stays() -> None:
    drops(plain(0, nn.ReLU()), lambda m: kill(m[0], *range(8)), "_0", 1)


class Separable(nn.Module):
    def __init__(
        self, padding: int = 1, mode: Mode = "zeros", pool: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.expand, self.first = nn.Conv2d(3, 8, 1), nn.ReLU6()
        self.depth = nn.Conv2d(8, 8, 3, padding=padding, padding_mode=mode, groups=8)
        self.second, self.pool = nn.ReLU6(), pool or nn.Identity()
        self.project = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.depth(self.first(self.expand(x))))
        return self.project(self.pool(x))


def test_a_dead_filter_in_between() -> None:
    """A depthwise filter of zeros makes its bias, whatever padding puts at the border."""
    drops(Separable(), lambda m: kill(m.depth, 5), "expand", 7)


@pytest.mark.parametrize(("padding", "mode"), [(0, "zeros"), (1, "reflect")])
def test_a_constant_goes_through_a_depthwise_layer(padding: int, mode: Mode) -> None:
    drops(Separable(padding, mode), lambda m: kill(m.expand, 5, bias=0.7), "expand", 7)


def test_not_through_one_with_zeros_at_the_border() -> None:
    gm = graph(Separable(), lambda m: kill(m.expand, 5, bias=0.7))
    assert not check.sites_of(RULE, gm)


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Upsample(scale_factor=2)],
)
def test_through_pools(pool: nn.Module) -> None:
    drops(Separable(pool=pool), lambda m: kill(m.depth, 5, 6), "expand", 6)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.project = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depth(torch.relu(self.expand(x))))
        gate = torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return self.project(x * torch.sigmoid(self.excite(gate)))


def test_behind_a_gate_a_zero_is_a_zero() -> None:
    drops(Gated(), lambda m: kill(m.depth, 5, bias=-1.0), "expand", 7)


def test_the_squeeze_keeps_what_it_read() -> None:
    """The gate of the channel is constant too: so is the product, and the squeeze's bias takes the constant."""

    def change(m: nn.Module) -> None:
        kill(m.depth, 5, bias=0.8)
        kill(m.excite, 5)

    drops(Gated(), change, "expand", 7)


def test_a_constant_under_a_live_gate_stays() -> None:
    gm = graph(Gated(), lambda m: kill(m.depth, 5, bias=0.8))
    assert not check.sites_of(RULE, gm)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(12, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(torch.cat([self.right(x), self.left(x)], 1)))


def test_beside_others_in_a_concatenation() -> None:
    drops(Joined(), lambda m: kill(m.left, 0, 3), "left", 6)


def test_linear_layers_of_a_sequence() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x.flatten(2).transpose(1, 2))))

    drops(Tokens(), lambda m: kill(m.first, 2), "first", 7)


def test_filters_that_rounding_loses_are_dead() -> None:
    def change(m: nn.Module) -> None:
        with torch.no_grad():
            m[0].weight[3] *= 1e-12

    gm = graph(plain(0, nn.ReLU()), change)
    (site,) = check.sites_of(RULE, gm)
    x = check.inputs(SHAPE)
    made = rewrite(gm, Plan((Step.at(site),)))
    torch.testing.assert_close(made(x), gm(x), rtol=1e-8, atol=1e-8)
