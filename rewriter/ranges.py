"""Channel ranges of every value of a float graph, for the rules that group or scale channels by them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from rewriter.graph import walk


def profile(gm: fx.GraphModule, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> None:
    """Write ``node.meta["channel_range"] = (low, high)``, each (C,), into every float value, in place.

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


def group_by_range(low: Tensor, high: Tensor, groups: int) -> list[list[int]]:
    """Put channels into groups that each share one range, with the least total rounding error.

    A value rounded in a range of width w has squared error proportional to w^2, so the cost of a group is its
    size times its width squared. Channels are sorted by the width of their range, and the best
    cut of that order into contiguous groups is found by dynamic programming. Several values that must be
    grouped alike are weighed by the mean square width of their channels, so that each counts by how uneven it is.

    Args:
        low, high: (C,) range of each channel, or (V, C) of each channel of V values.
        groups: number of groups, at most C.

    Returns:
        Channel indices of each group, each in ascending order, the group of the widest range last.
    """
    low, high = _level(low, high)
    order = torch.argsort(width(low, high).amax(0), stable=True)
    lo, hi = low[:, order].clamp_max(0), high[:, order].clamp_min(0)
    n = len(order)
    groups = min(groups, n)
    # cost[i, j]: channels i..j-1 in one group
    cost = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    for i in range(n):
        span = hi[:, i:].cummax(1).values - lo[:, i:].cummin(1).values
        cost[i, i + 1 :] = torch.arange(1, n - i + 1) * span.square().sum(0)
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
    return [sorted(order[a:b].tolist()) for a, b in zip(bounds, bounds[1:], strict=False)]


def rounding_error(low: Tensor, high: Tensor, groups: list[list[int]]) -> float:
    """Total expected squared rounding error of channels in ``groups``, relative to a range for each channel.

    1 means that no channel loses by sharing. ``low`` and ``high`` are (C,), or (V, C) for several values.
    """
    low, high = _level(low, high)
    total = 0.0
    for group in groups:
        span = high[:, group].clamp_min(0).amax(1) - low[:, group].clamp_max(0).amin(1)
        total += len(group) * float(span.square().sum())
    return total / low.numel()


def _level(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(V, C) ranges, each value's divided by the root mean square of its channels' widths."""
    low, high = (r.double().view(-1, r.shape[-1]) for r in (low, high))
    size = width(low, high).square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    return low / size, high / size
