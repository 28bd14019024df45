"""Channel ranges of every value of a float graph, and groups of channels of like range."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewriter.graph.channel_ranges import width

# How many orders of the channels are tried when several values are grouped alike.
ORDERS = 4
# Spans of that many pieces of an order are found at once, to bound the memory.
PIECE = 1 << 19
# More places than these are not tried: time and memory grow with their square.
PLACES = 1024

Array = np.ndarray[Any, Any]


def group_by_range(
    low: Tensor,
    high: Tensor,
    groups: int,
    importance: Tensor | None = None,
    multiple: int = 1,
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
        multiple: every group but the last has a multiple of so many channels, and the last at least so many; 1: any.

    Returns:
        Channel indices of each group, each in ascending order, the group of the widest range last.
    """
    prepared = _prepared(low, high, importance)
    # every plan of a search asks the same of most values again, and of each value once per rule
    shape, content = prepared[0].shape, tuple(x.numpy().tobytes() for x in prepared)
    return [list(group) for group in _grouped(content, tuple(shape), groups, multiple)]


@lru_cache(maxsize=1024)
def _grouped(
    content: tuple[bytes, ...], shape: tuple[int, ...], groups: int, multiple: int
) -> tuple[tuple[int, ...], ...]:
    """``group_by_range`` of the bytes of lower ends, upper ends and importance, each (V, C) in float64."""
    low, high, weight = (
        torch.from_numpy(np.frombuffer(x, dtype=np.float64).reshape(shape).copy()) for x in content
    )
    widths = width(low, high)
    most = (widths.square() * weight).sum(1).argsort(descending=True)[:ORDERS]
    keys = [(widths / widths.amax(1, keepdim=True).clamp_min(1e-30)).amax(0), *widths[most]]
    orders = dict.fromkeys(tuple(torch.argsort(k, stable=True).tolist()) for k in keys)
    found = [_best_cut(low, high, weight, list(order), groups, multiple) for order in orders]
    return tuple(tuple(group) for group in min(found, key=lambda f: f[0])[1])


def _best_cut(
    low: Tensor, high: Tensor, weight: Tensor, order: list[int], groups: int, multiple: int
) -> tuple[float, list[list[int]]]:
    """Cost and groups of the best cut of channels in ``order`` into contiguous groups."""
    lo, hi = low[:, order].clamp_max(0).numpy(), high[:, order].clamp_min(0).numpy()
    total = np.pad(weight[:, order].numpy().cumsum(1), ((0, 0), (1, 0)))  # (V, n + 1)
    places = _places(len(order), multiple)
    if len(places) <= len(order):  # channels between two places stay together
        starts = places[:-1]
        lo, hi = np.minimum.reduceat(lo, starts, 1), np.maximum.reduceat(hi, starts, 1)
        total = total[:, places]
    n = len(places) - 1
    groups = min(groups, n)
    # best[j]: least cost of the first j channels in the groups so far
    span = np.maximum.accumulate(hi, 1) - np.minimum.accumulate(lo, 1)
    best = np.pad((span**2 * total[:, 1:]).sum(0), (1, 0))
    cuts: list[Array] = []
    if groups > 2:
        cost = _cut_costs(lo, hi, total)
        for _ in range(groups - 2):
            whole = best[:, None] + cost
            cuts.append(whole.argmin(0))
            best = whole[cuts[-1], np.arange(n + 1)]
    found, at = float(best[n]), n
    if groups > 1:  # the last group ends with the last channel: no more than one column is needed
        top, bottom = hi[:, ::-1], lo[:, ::-1]
        span = (np.maximum.accumulate(top, 1) - np.minimum.accumulate(bottom, 1))[:, ::-1]
        whole = best[:n] + (span**2 * (total[:, n:] - total[:, :n])).sum(0)
        at = int(whole.argmin())
        found = float(whole[at])
    bounds = [n, at] if groups > 1 else [n]
    for where in reversed(cuts):
        bounds.append(int(where[bounds[-1]]))
    bounds = [0, *[int(places[b]) for b in reversed(bounds) if b > 0]]
    return found, [sorted(order[a:b]) for a, b in pairwise(bounds)]


def _places(channels: int, multiple: int) -> Array:
    """Where channels in order of their width may be cut: everywhere among the widest, which the cost is made of."""
    if multiple > 1:
        return np.array([*range(0, max(channels - multiple, 0) + 1, multiple), channels])
    if channels <= PLACES:
        return np.arange(channels + 1)
    last = channels - PLACES // 2
    return np.concatenate(
        [
            np.linspace(0, last, PLACES // 2, endpoint=False).astype(int),
            np.arange(last, channels + 1),
        ]
    )


def _cut_costs(lo: Array, hi: Array, total: Array) -> Array:
    """(n + 1, n + 1) cost of channels i..j-1 in one group at [i, j]; infinite where there are none."""
    n = lo.shape[1]
    cost = np.full((n + 1, n + 1), np.inf)
    rows = max(1, PIECE // (lo.shape[0] * n))
    for start in range(0, n, rows):
        i = np.arange(start, min(start + rows, n))
        inside = np.arange(n) >= i[:, None]
        # what is outside counts as zero, which every range holds
        span = np.maximum.accumulate(np.where(inside, hi[:, None], 0.0), 2)
        span -= np.minimum.accumulate(np.where(inside, lo[:, None], 0.0), 2)
        energy = (span**2 * (total[:, None, 1:] - total[:, i, None])).sum(0)
        cost[i, 1:] = np.where(inside, energy, np.inf)
    return cost


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
