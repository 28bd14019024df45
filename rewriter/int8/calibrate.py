"""Ranges of activations from a few unlabeled inputs, streaming.

Memory is one batch and, for each value, its channel ranges and (where asked for) one histogram.
``minmax`` takes the largest and smallest value seen; ``percentile`` cuts 0.005 % of the values
on each side; ``mse`` takes the range with the least expected squared rounding and clipping
error under the histogram (Nagel et al., 2021, arXiv:2106.08295, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx

from rewriter.errors import QuantizeError
from rewriter.graph.axes import channel_axes
from rewriter.graph.channel_ranges import channel_range, hull
from rewriter.graph.interpret import walk
from rewriter.graph.lookup import layer_name, layers, module_of
from rewriter.int8.annotate import annotation, moves_values
from rewriter.int8.integer_grid import least_weight_scale
from rewriter.int8.scheme import TINY, QuantSpec, channel_axis, weight_scale

Method = Literal["minmax", "percentile", "mse"]
BINS = 2048
PERCENTILE = 0.99995


@dataclass
class Histogram:
    """Counts of values in ``BINS`` equal bins over [-bound, bound]; the bound doubles at need."""

    bound: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add(self, x: Tensor, largest: float) -> None:
        if largest == 0.0:
            self.counts[BINS // 2] += x.numel()
            return
        if self.bound == 0.0:
            self.bound = largest
        while largest > self.bound:  # merge pairs of bins: same counts, twice the width
            inner = self.counts.view(-1, 2).sum(1)
            self.counts.zero_()
            self.counts[BINS // 4 : BINS // 4 + BINS // 2] = inner
            self.bound *= 2
        self.counts += torch.histc(x.float(), BINS, -self.bound, self.bound).double()

    @property
    def centres(self) -> Tensor:
        """(BINS,) middle of each bin."""
        width = 2 * self.bound / BINS
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * width - self.bound

    def quantiles(self, share: float) -> tuple[float, float]:
        """The range that leaves ``1 - share`` of the values outside on each side."""
        total = self.counts.cumsum(0) / self.counts.sum()
        edges = self.centres
        low = edges[int((total >= 1 - share).nonzero()[0])]
        high = edges[int((total >= share).nonzero()[0])]
        return float(low), float(high)


@dataclass
class ValueStats:
    """What calibration saw of one value: its range, and that of each channel (``rewriter.graph.axes``)."""

    low: float
    high: float
    channel_low: Tensor
    channel_high: Tensor
    histogram: Histogram | None = None


@dataclass
class Calibration:
    """Ranges of a graph.

    Args:
        values: (low, high) by the name of the value that owns the range
            (``annotation(node).range_of``).
        weights: scale of each int8 layer's weight, () or (C_out,), by node name.
        stats: what was seen, by node name.
        samples: number of inputs.
    """

    values: dict[str, tuple[float, float]]
    weights: dict[str, Tensor]
    stats: dict[str, ValueStats]
    samples: int


def calibrate(
    gm: fx.GraphModule,
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    method: Method = "minmax",
    histograms: bool = False,
) -> Calibration:
    """Ranges of an annotated graph from its float values on ``batches``.

    Args:
        gm: annotated canonical graph.
        batches: inputs (N, C, H, W), or a tuple with one tensor for each input.
        method: how a range follows from what was seen.
        histograms: keep a histogram of each value (``percentile`` and ``mse`` keep them anyway).

    Raises:
        QuantizeError: there is no sample, or a value is NaN or infinite.
    """
    if method not in ("minmax", "percentile", "mse"):
        raise QuantizeError(f"calibration: method: {method!r} is not minmax, percentile or mse")
    histograms = histograms or method != "minmax"
    stats: dict[str, ValueStats] = {}
    samples, axes = 0, channel_axes(gm)
    with torch.no_grad():
        for batch in batches:
            inputs = batch if isinstance(batch, tuple) else (batch,)
            samples += len(inputs[0])
            for node, value in walk(gm, inputs, in_place=True):
                if is_observed(gm, node):
                    _observe(stats, node, value, histograms, axes.get(node, 1))
    if samples == 0:
        raise QuantizeError("calibration: no input was given")
    return from_stats(gm, stats, samples, method)


def is_observed(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether calibration looks at a node's value; what was moved in int8 has the range of its source."""
    note = annotation(node)
    return note.output is not None and not (moves_values(gm, node) and note.reads)


def from_stats(
    gm: fx.GraphModule, stats: dict[str, ValueStats], samples: int, method: Method = "minmax"
) -> Calibration:
    """The ranges of an annotated graph, from what was seen of its values."""
    values = _ranges(gm, stats, method)
    return Calibration(values, weight_scales(gm, values), stats, samples)


def _observe(
    stats: dict[str, ValueStats], node: fx.Node, value: Tensor, histograms: bool, axis: int
) -> None:
    rows = value.detach()
    if rows.ndim >= 2:
        low, high = (r.cpu() for r in channel_range(rows, axis))
    else:
        low, high = rows.amin().view(1).cpu(), rows.amax().view(1).cpu()
    least, most = float(low.min()), float(high.max())
    if not (abs(least) < float("inf") and abs(most) < float("inf")):  # also false for NaN
        raise QuantizeError(f"{layer_name(node)}: value: NaN or infinite on calibration inputs")
    seen = stats.get(node.name)
    if seen is None:
        seen = stats[node.name] = ValueStats(
            least, most, low, high, Histogram() if histograms else None
        )
    else:
        seen.low, seen.high = min(seen.low, least), max(seen.high, most)
        known = seen.channel_low, seen.channel_high
        seen.channel_low, seen.channel_high = hull(known, (low, high))
    if seen.histogram is not None:
        seen.histogram.add(rows, max(-least, most))


def _ranges(
    gm: fx.GraphModule, stats: dict[str, ValueStats], method: Method
) -> dict[str, tuple[float, float]]:
    """One range for each owner: the hull over all values that share it."""
    values: dict[str, tuple[float, float]] = {}
    for node in gm.graph.nodes:
        note = annotation(node)
        if note.output is None or node.name not in stats:
            continue
        low, high = value_range(stats[node.name], note.output, method)
        known = values.get(note.range_of, (low, high))
        values[note.range_of] = (min(low, known[0]), max(high, known[1]))
    return values


def value_range(stats: ValueStats, spec: QuantSpec, method: Method) -> tuple[float, float]:
    """The range of one value by one method."""
    histogram = stats.histogram
    if method == "minmax" or histogram is None or histogram.bound == 0.0:
        return stats.low, stats.high
    if method == "percentile":
        low, high = histogram.quantiles(PERCENTILE)
        return max(low, stats.low), min(high, stats.high)
    return least_error_range(histogram, stats.low, stats.high, spec)


def least_error_range(
    histogram: Histogram, low: float, high: float, spec: QuantSpec, steps: int = 24
) -> tuple[float, float]:
    """The (low, high) inside the seen range with the least expected squared error, on a grid.

    What is outside the range is cut off; inside, rounding is uniform: step^2 / 12, but for
    zero, which is exact.
    """
    used = histogram.counts > 0
    x, weight = histogram.centres[used], histogram.counts[used]
    rounded = weight.clone()
    rounded[x.abs() < histogram.bound / BINS * 1.5] = 0  # the two bins at zero
    shares = torch.linspace(1.0, 0.2, steps).tolist()
    if spec.symmetric:
        largest = max(-low, high)
        ranges = [(max(low, -largest * s), min(high, largest * s)) for s in shares]
    else:
        lows = [low * s for s in shares] if low < 0 else [low]
        ranges = [(lo, high * s) for lo in lows for s in (shares if high > 0 else [1.0])]
    scales, zeros = (
        torch.tensor(v).double() for v in zip(*[spec.params(*r) for r in ranges], strict=True)
    )
    bottom, top = (spec.qmin - zeros) * scales, (spec.qmax - zeros) * scales
    cut = x - torch.clamp(x, bottom[:, None], top[:, None])  # (ranges, bins)
    errors = cut.square() @ weight + scales.square() / 12 * rounded.sum()
    return ranges[int(errors.argmin())]


def weight_scales(gm: fx.GraphModule, values: dict[str, tuple[float, float]]) -> dict[str, Tensor]:
    """Min-max scale of every int8 layer's weight, raised where the int32 bias would overflow."""
    scales: dict[str, Tensor] = {}
    for node in layers(gm):
        note = annotation(node)
        if note.weight is None:
            continue
        layer = module_of(gm, node)
        axis = channel_axis(layer, note.weight)
        scale = weight_scale(layer.weight, note.weight, axis)
        step = input_scale(gm, node, values)
        if layer.bias is not None and step is not None and not note.float_bias:
            least = least_weight_scale(layer.bias, step, axis is not None)
            scale = torch.maximum(scale, least.float())
        scales[node.name] = scale.clamp_min(TINY)
    return scales


def input_scale(
    gm: fx.GraphModule, node: fx.Node, values: dict[str, tuple[float, float]]
) -> float | None:
    """The scale of the int8 value that a layer reads; None where it reads a float."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.name not in annotation(node).reads:
        return None
    note = annotation(source)
    if note.output is None or note.range_of not in values:
        return None
    return note.output.params(*values[note.range_of])[0]
