"""Ranges with the least expected damage: rounding errors inside against what is cut off, each channel by its influence.

One pass over the inputs fills, for each value, a histogram in which every element counts with its channel's
influence; each range is then a small search on its histogram.
Source: after Nagel et al., 2021 (arXiv:2106.08295), section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, fx

from rewriter.graph import walk
from rewriter.int8.annotate import annotation, moves_values
from rewriter.int8.scheme import QuantSpec
from rewriter.int8.simulate import Quantized

BINS = 1024
# Inputs that fill the histograms.
INPUTS = 48
# Candidates for each end of a range, as shares of what was seen.
SHARES = tuple(0.96**i for i in range(30))


def least_damage_ranges(
    quantized: Quantized, batches: Iterable[Tensor | tuple[Tensor, ...]]
) -> Quantized:
    """The same network with refined ranges; values of unknown influence keep theirs.

    Args:
        quantized: annotated graph with min-max ranges.
        batches: calibration inputs, each (N, ...), or a tuple with one tensor for each input.
    """
    ranges = quantized.calibration.values
    counts: dict[str, Tensor] = {}
    for node, value in _observed(quantized.gm, batches):
        owner = annotation(node).range_of
        weight = node.meta["influence"].to(value.dtype)
        low, high = _ends(*ranges[owner])
        counts[owner] = counts.get(owner, torch.zeros(BINS, dtype=torch.float64)) + _histogram(
            value, weight, low, high
        )
    specs = {annotation(n).range_of: annotation(n).output for n in quantized.gm.graph.nodes}
    refined = dict(ranges)
    for owner, histogram in counts.items():
        spec = specs[owner]
        assert spec is not None
        refined[owner] = best_range(histogram, *_ends(*ranges[owner]), spec)
    return replace(quantized, calibration=replace(quantized.calibration, values=refined))


def _ends(low: float, high: float) -> tuple[float, float]:
    return min(low, 0.0), max(high, 1e-12)


def _observed(
    gm: fx.GraphModule, batches: Iterable[Tensor | tuple[Tensor, ...]]
) -> Iterable[tuple[fx.Node, Tensor]]:
    left = INPUTS
    with torch.no_grad():
        for batch in batches:
            inputs = tuple(x[:left] for x in (batch if isinstance(batch, tuple) else (batch,)))
            if not len(inputs[0]):
                return
            left -= len(inputs[0])
            for node, value in walk(gm, inputs):
                known = node.meta.get("influence")
                if annotation(node).output is None or moves_values(gm, node):
                    continue
                if known is not None and value.ndim >= 2 and known.shape == value.shape[1:2]:
                    yield node, value


def _histogram(value: Tensor, weight: Tensor, low: float, high: float) -> Tensor:
    """(BINS,) sum of the influence of the elements of (N, C, ...) in each bin of [low, high]."""
    index = ((value - low) * (BINS / (high - low))).long().clamp_(0, BINS - 1)
    # a channel's influence is a sum over its positions: each element has its share
    places = max(1, value[0, 0].numel())
    wide = (weight / places).view(1, -1, *[1] * (value.ndim - 2)).expand_as(value)
    return torch.bincount(index.flatten(), wide.flatten().double(), BINS)


def best_range(counts: Tensor, low: float, high: float, spec: QuantSpec) -> tuple[float, float]:
    """The (low, high) with the least weighted squared error for values with this histogram.

    Args:
        counts: (BINS,) weight of the values in equal bins over [low, high].
        low: smallest value, at most 0.
        high: largest value, above 0.
        spec: how the value is stored.
    """
    x = low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * ((high - low) / BINS)
    best, least = (low, high), float("inf")
    for below in SHARES if low < 0 else (1.0,):
        for above in SHARES:
            candidate = (low * below, high * above)
            scale, zero = spec.params(*candidate)
            cut = x - x.clamp((spec.qmin - zero) * scale, (spec.qmax - zero) * scale)
            error = float((counts * (cut.square() + scale**2 / 12)).sum())
            if error < least:
                best, least = candidate, error
    return best
