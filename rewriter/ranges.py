"""Channel ranges of every value of a float graph, and groups of channels of like range."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, fx

from rewriter.graph import walk

# How many orders of the channels are tried when several values are grouped alike.
ORDERS = 4


def profile(gm: fx.GraphModule, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> None:
    """Write ``node.meta["channel_range"] = (low, high)``, each (C,), at every value, in place.

    Args:
        gm: canonical graph.
        batches: calibration inputs (N, ...), or a tuple with one tensor for each input.
    """
    with torch.no_grad():
        for batch in batches:
            inputs = batch if isinstance(batch, tuple) else (batch,)
            for node, value in walk(gm, inputs):
                if not isinstance(value, Tensor) or value.ndim < 2 or node.op == "get_attr":
                    continue
                if not value.is_floating_point():
                    continue
                axes = [d for d in range(value.ndim) if d != 1]
                low, high = value.amin(axes), value.amax(axes)
                if "channel_range" in node.meta:
                    seen_low, seen_high = node.meta["channel_range"]
                    low, high = torch.minimum(low, seen_low), torch.maximum(high, seen_high)
                node.meta["channel_range"] = (low, high)


def width(low: Tensor, high: Tensor) -> Tensor:
    """Width of each channel's range with zero inside: what an affine int8 scale has to span."""
    return high.clamp_min(0) - low.clamp_max(0)


def group_by_range(
    low: Tensor, high: Tensor, groups: int, importance: Tensor | None = None
) -> list[list[int]]:
    """Put channels into groups that each share one range, with the least total rounding error.

    A value rounded in a range of width w has squared error proportional to w^2, so the cost of a
    group is the sum of its channels' importance times its width squared. Channels are sorted by
    the width of their range, and the best cut of that order into contiguous groups is found by
    dynamic programming. Where several values must be grouped alike, the order by each of them is
    tried.

    Args:
        low: (C,) lower end of each channel's range, or (V, C) of each channel of V values.
        high: upper ends.
        groups: number of groups, at most C.
        importance: (C,) or (V, C) what a squared error in a channel counts; by default each value
            counts by how uneven its channels are.

    Returns:
        Channel indices of each group, each in ascending order, the group of the widest range last.
    """
    low, high, weight = _prepared(low, high, importance)
    widths = width(low, high)
    most = (widths.square() * weight).sum(1).argsort(descending=True)[:ORDERS]
    keys = [(widths / widths.amax(1, keepdim=True).clamp_min(1e-30)).amax(0), *widths[most]]
    found = [_best_cut(low, high, weight, torch.argsort(k, stable=True), groups) for k in keys]
    return min(found, key=lambda f: f[0])[1]


def _best_cut(
    low: Tensor, high: Tensor, weight: Tensor, order: Tensor, groups: int
) -> tuple[float, list[list[int]]]:
    """Cost and groups of the best cut of channels in ``order`` into contiguous groups."""
    lo, hi = low[:, order].clamp_max(0), high[:, order].clamp_min(0)
    n = len(order)
    groups = min(groups, n)
    # cost[i, j]: channels i..j-1 in one group
    cost = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    for i in range(n):
        span = hi[:, i:].cummax(1).values - lo[:, i:].cummin(1).values
        cost[i, i + 1 :] = (span.square() * weight[:, order[i:]].cumsum(1)).sum(0)
    best = cost[0].clone()  # best[j]: least cost of the first j channels in the groups so far
    best[0] = 0.0
    cuts: list[Tensor] = []
    for _ in range(groups - 1):
        total = best[:, None] + cost
        total[torch.tril(torch.ones(n + 1, n + 1, dtype=torch.bool))] = float("inf")
        values, where = total.min(0)
        cuts.append(where)
        best = values
    bounds = [n]
    for where in reversed(cuts):
        bounds.append(int(where[bounds[-1]]))
    bounds = [0, *[b for b in reversed(bounds) if b > 0]]
    found = [sorted(order[a:b].tolist()) for a, b in pairwise(bounds)]
    return float(best[n]), found


def rounding_error(
    low: Tensor, high: Tensor, groups: list[list[int]], importance: Tensor | None = None
) -> float:
    """Expected squared rounding error of channels in ``groups``, relative to a range for each.

    1 means that no channel loses by sharing. Arguments as those of ``group_by_range``.
    """
    low, high, weight = _prepared(low, high, importance)
    total = 0.0
    for group in groups:
        span = high[:, group].clamp_min(0).amax(1) - low[:, group].clamp_max(0).amin(1)
        total += float((weight[:, group].sum(1) * span.square()).sum())
    alone = float((weight * width(low, high).square()).sum())
    return total / max(alone, 1e-300)


def _prepared(
    low: Tensor, high: Tensor, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(V, C) ranges and importance in float64."""
    low, high = (r.double().view(-1, r.shape[-1]) for r in (low, high))
    if importance is None:
        size = width(low, high).square().mean(1, keepdim=True).clamp_min(1e-300)
        return low, high, (1 / size).expand_as(low)
    return low, high, importance.double().view(-1, importance.shape[-1])
