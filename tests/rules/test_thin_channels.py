from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from rewriter import Plan, cost, find_sites, rewrite
from rewriter.graph.edit import copy_graph
from rewriter.graph.lookup import find, module_of
from rewriter.rules.thin_channels import AMOUNTS, ThinChannels, kept_counts
from rewriter.surgery.hidden_channels import hidden_channels, hidden_of, keep_channels
from tests.networks import seeds
from tests.rules import check

HALF = ThinChannels(50)
SHAPE = (3, 12, 9)


class Gated(nn.Module):
    """A squeeze and excitation as EfficientNet has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(torch.relu(self.reduce(y))))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Joined(nn.Module):
    """As a CSP neck: two branches side by side, read by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 32, 3, padding=1)
        self.last = nn.Conv2d(48, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(torch.cat([self.a(x), self.b(x).relu()], 1)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 3, 3)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        t = self.embed(x).flatten(2).transpose(1, 2)
        return t + self.down(nn.functional.gelu(self.up(self.norm(t))))


def inverted(channels: int = 32, gate: bool = False, groups: int = 0) -> nn.Module:
    middle = nn.Conv2d(channels, channels, 3, padding=1, groups=groups or channels)
    return nn.Sequential(
        nn.Conv2d(3, channels, 1),
        nn.PReLU(channels),
        middle,
        nn.ReLU6(),
        Gated(channels) if gate else nn.Identity(),
        nn.Conv2d(channels, 3, 1),
    )


NETWORKS = {
    "inverted residual": (inverted(), 1),
    "gated": (inverted(gate=True), 1),
    "groups": (inverted(groups=4), 1),
    "residual": (Residual(inverted()), 1),
    "basic block": (
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1)),
        1,
    ),
    "joined": (Joined(), 2),
    "tokens": (Tokens(), 1),
    "classifier": (
        nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
        ),
        1,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_site(name: str) -> None:
    model, sites = NETWORKS[name]
    new = check.rewrites(HALF, model, SHAPE, sites)
    assert cost(new.float()).macs < cost(check.graph_of(model, SHAPE).float()).macs


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_known_without_a_rewrite(name: str) -> None:
    gm = check.graph_of(check.randomise(NETWORKS[name][0]), SHAPE)
    before = cost(gm.float()).macs
    for site in check.sites_of(HALF, gm):
        new = rewrite(gm, Plan.parse(f"{site.rule}@{site.anchor}"))
        assert HALF.added_macs(gm, site) == cost(new).macs - before


@settings(deadline=None, max_examples=24, derandomize=True)
@given(seeds)
def test_all_channels_kept_is_the_same_function(seed: int) -> None:
    """And channels that contribute nothing can go: exact to 1e-9 in float64."""
    name = list(NETWORKS)[seed % len(NETWORKS)]
    gm = check.graph_of(check.randomise(NETWORKS[name][0], seed), SHAPE)
    x = check.inputs(SHAPE)
    for hidden in hidden_channels(gm):
        if hidden.blocked:
            continue
        silent = torch.arange(0, hidden.channels, 3)
        silent = silent[silent < hidden.channels - hidden.unit]
        silent = torch.unique(silent // hidden.unit)[:, None] * hidden.unit
        silent = (silent + torch.arange(hidden.unit)).flatten()
        mute = copy_graph(gm)
        assert hidden.reader is not None
        readers = [find(mute, hidden.reader.name)]
        readers += [find(mute, g.squeeze.name) for g in hidden.gates]
        for reader in readers:
            offset = hidden.offset if reader.name == hidden.reader.name else 0
            module_of(mute, reader).weight.data[:, silent + offset] = 0
        expected = check.flat(mute(x))
        kept = torch.arange(hidden.channels)
        for left in (kept, kept[~torch.isin(kept, silent)]):
            new = copy_graph(mute)
            keep_channels(new, hidden_of(new, find(new, hidden.entry.name)), left)
            new.recompile()
            for a, b in zip(check.flat(new(x)), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))
            check.assert_shapes(new, x)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 16, 1) for n in (3, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return torch.cat([self.b(x).mean((2, 3)), self.c(x).mean((2, 3))], 1)


class Reshaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Linear(16 * 108, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).flatten(1))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (TwoReaders(), "read by 2 layers"),
        (Reshaped(), "reads a"),
        (Residual(nn.Conv2d(3, 3, 1)), "is added to"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)), "no smaller multiple"),
        (nn.Conv2d(3, 16, 1), "the network returns"),
    ],
)
def test_near_misses(model: nn.Module, reason: str) -> None:
    check.refuses(ThinChannels(AMOUNTS[0]), model, reason, SHAPE)


def test_weights_that_are_used_elsewhere_stay() -> None:
    gm = check.graph_of(check.randomise(inverted()), SHAPE)
    gm.add_submodule("other", nn.Conv2d(3, 32, 1))
    gm.get_submodule("other").weight = module_of(gm, find(gm, "_0")).weight
    assert "are used elsewhere too" in hidden_of(gm, find(gm, "_0")).blocked


@pytest.mark.parametrize("channels", [16, 24, 40, 64, 96, 100, 240, 1280])
@pytest.mark.parametrize("unit", [1, 4, 24])
def test_counts_are_multiples_that_differ(channels: int, unit: int) -> None:
    channels *= unit
    counts = kept_counts(channels, unit)
    assert len(set(counts.values())) == len(counts)
    for percent, count in counts.items():
        assert 0 < count < channels
        assert count % unit == 0
        assert count % 8 == 0
        assert percent in AMOUNTS


def test_steps_are_applied_upstream_first_whatever_they_are_called() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 3, 1)
    )
    gm = check.graph_of(check.randomise(model), SHAPE)
    new = check.rewritten_by_plan(gm, "thin_channels_75@_2", "thin_channels_50@_0")
    shapes = [tuple(m.weight.shape[:2]) for m in new.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(8, 3), (24, 8), (3, 24)]
    anchors = [s.anchor for s in find_sites(gm) if s.rule == "thin_channels_50" and not s.blocked]
    assert anchors == ["_0", "_2"]
