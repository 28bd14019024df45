from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.graph.axes import channel_axes
from rewriter.graph.channel_ranges import channel_range, profile, width
from rewriter.graph.interpret import walk
from rewriter.surgery.group_channels import group_by_range, rounding_error
from rewriter.tracing.trace import trace
from tests.networks import SIZE, network


@pytest.mark.parametrize("seed", range(4))
def test_profile_against_all_values_at_once(seed: int) -> None:
    gm = trace(network(seed), torch.randn(2, *SIZE))
    batches = [torch.randn(2, *SIZE), torch.randn(3, *SIZE) * 3]
    profile(gm, batches)
    axes = channel_axes(gm)
    with torch.no_grad():
        values = [dict(walk(gm, (b,))) for b in batches]
    for node in gm.graph.nodes:
        tensors = [v[node] for v in values if node in v]
        if not tensors or tensors[0].ndim < 2:
            continue
        axis = axes.get(node, 1)
        channels = torch.cat([t.movedim(axis, 0).flatten(1) for t in tensors], 1)
        low, high = node.meta["channel_range"]
        assert torch.equal(low, channels.amin(1)), node.name
        assert torch.equal(high, channels.amax(1)), node.name


@pytest.mark.parametrize("shape", [(3, 5, 7, 6), (2, 1, 4, 4), (2, 4, 1, 1), (4, 5), (2, 3, 8)])
@pytest.mark.parametrize("last", [False, True])
def test_range_of_each_channel_in_any_layout(shape: tuple[int, ...], last: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    low, high = channel_range(x)
    rows = x.transpose(0, 1).reshape(shape[1], -1)
    assert torch.equal(low, rows.min(1).values)
    assert torch.equal(high, rows.max(1).values)


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_many_channels_are_cut_like_few(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = ranges(60, 5)
    whole = group_by_range(low, high, groups)
    monkeypatch.setattr("rewriter.surgery.group_channels.PIECE", 7)  # row by row
    assert group_by_range(low, high, groups) == whole


def test_width_holds_zero() -> None:
    low, high = torch.tensor([-2.0, 1.0, -5.0, 0.0]), torch.tensor([3.0, 4.0, -1.0, 0.0])
    assert width(low, high).tolist() == [5.0, 4.0, 5.0, 0.0]


def ranges(n: int, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    size = 10 ** (torch.rand(n) * 3 - 1)
    return -size * torch.rand(n), size * torch.rand(n)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_groups_against_every_cut(n: int, groups: int, seed: int) -> None:
    low, high = ranges(n, seed)
    found = group_by_range(low, high, groups)
    assert sorted(c for g in found for c in g) == list(range(n))
    assert 1 <= len(found) <= min(groups, n)
    assert all(g == sorted(g) for g in found)
    order = torch.argsort(width(low, high), stable=True).tolist()
    best = float("inf")
    for cuts in itertools.combinations(range(1, n), min(groups, n) - 1):
        parts = [order[a:b] for a, b in itertools.pairwise((0, *cuts, n))]
        best = min(best, rounding_error(low, high, parts))
    assert rounding_error(low, high, found) == pytest.approx(best, rel=1e-9)


def test_groups_of_plainly_different_channels() -> None:
    low = torch.tensor([-1.0, -100.0, -1.1, -0.01, -99.995, -0.02])
    assert group_by_range(low, -low, 3) == [[3, 5], [0, 2], [1, 4]]
    assert group_by_range(low, -low, 1) == [[0, 1, 2, 3, 4, 5]]
    assert len(group_by_range(low[:2], -low[:2], 5)) == 2


@given(st.integers(2, 7), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_more_groups_never_cost_more(n: int, seed: int) -> None:
    low, high = ranges(n, seed)
    errors = [rounding_error(low, high, group_by_range(low, high, k)) for k in range(1, n + 1)]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors))


def test_values_that_are_grouped_alike() -> None:
    low, high = ranges(7, 3)
    alone = group_by_range(low, high, 3)
    both = group_by_range(torch.stack([low, low * 50]), torch.stack([high, high * 50]), 3)
    assert both == alone  # how large a value is does not matter, how uneven its channels are does
    flat = torch.full((7,), 4.0)
    assert group_by_range(torch.stack([low, -flat]), torch.stack([high, flat]), 3) == alone


def test_dead_channels_do_not_divide_by_zero() -> None:
    low = high = torch.zeros(4)
    found = group_by_range(low, high, 2)
    assert sorted(c for g in found for c in g) == [0, 1, 2, 3]
    assert rounding_error(low, high, found) == 0.0


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_thousands_of_channels_lose_nothing_by_fewer_places(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = torch.exp(torch.randn(1500, generator=torch.Generator().manual_seed(3)))
    monkeypatch.setattr("rewriter.surgery.group_channels.PLACES", 200)
    found = group_by_range(-widths, widths, groups)
    monkeypatch.setattr("rewriter.surgery.group_channels.PLACES", 1500)
    exact = group_by_range(-widths, widths, groups)
    assert sorted(c for g in found for c in g) == list(range(1500))
    few, all_ = (rounding_error(-widths, widths, g) for g in (found, exact))
    assert few == pytest.approx(all_, rel=0.01)


def test_each_of_several_values_counts_relative_to_its_own_mean_square() -> None:
    """(2 * 9 / 5 + 2 * 4 / 4) over (2 + 2): worked out by hand."""
    high = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert rounding_error(torch.zeros(2, 2), high, [[0, 1]]) == pytest.approx(5.6 / 4)


@pytest.mark.parametrize(("channels", "groups"), [(16, 2), (24, 2), (40, 3), (44, 3), (21, 2)])
def test_groups_of_multiples(channels: int, groups: int) -> None:
    """The best cut among those that are allowed, by trying all of them."""
    torch.manual_seed(channels)
    widths = torch.rand(channels).pow(4) + 0.01
    found = group_by_range(-widths, widths, groups, multiple=8)
    sizes = [len(g) for g in found]
    assert len(sizes) == groups
    assert all(s % 8 == 0 for s in sizes[:-1])
    assert sizes[-1] >= 8
    order = widths.argsort().tolist()
    cuts = itertools.combinations(range(8, channels - 7, 8), groups - 1)
    allowed = [[order[a:b] for a, b in itertools.pairwise((0, *cut, channels))] for cut in cuts]
    least = min(rounding_error(-widths, widths, g) for g in allowed)
    assert rounding_error(-widths, widths, found) == pytest.approx(least)
