"""The range of every channel of every value of a float graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from rewriter.graph import facts
from rewriter.graph.axes import channel_axes
from rewriter.graph.interpret import walk

Range = tuple[Tensor, Tensor]


def profile(gm: fx.GraphModule, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> None:
    """Write ``facts.CHANNEL_RANGE``, (low, high), each (C,), at every value, in place.

    Channels are those of ``rewriter.graph.axes.channel_axes``.

    Args:
        gm: canonical graph.
        batches: calibration inputs (N, ...), or a tuple with one tensor for each input.
    """
    axes = channel_axes(gm)
    with torch.no_grad():
        for batch in batches:
            inputs = batch if isinstance(batch, tuple) else (batch,)
            for node, value in walk(gm, inputs):
                if not isinstance(value, Tensor) or value.ndim < 2 or node.op == "get_attr":
                    continue
                if not value.is_floating_point():
                    continue
                low, high = channel_range(value, axes.get(node, 1))
                found = low.cpu(), high.cpu()
                if facts.CHANNEL_RANGE.known(node):
                    found = hull(facts.CHANNEL_RANGE.of(node), found)
                facts.CHANNEL_RANGE.put(node, found)


def range_of(node: fx.Node, channels: int) -> Range | None:
    """What ``profile`` saw of a value with so many channels; None where that is not known.

    A range of another length belongs to what stood here before a step changed it.
    """
    known = facts.CHANNEL_RANGE.get(node)
    return known if known is not None and len(known[0]) == channels else None


def hull(a: Range, b: Range) -> Range:
    """The range that holds two, channel by channel; of the whole value, (1,), where their numbers of channels differ.

    They do where the axis grows with the batch, and batches have different sizes.
    """
    if a[0].shape != b[0].shape:
        a, b = ((low.min().view(1), high.max().view(1)) for low, high in (a, b))
    return torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1])


def channel_range(x: Tensor, axis: int = 1) -> Range:
    """Smallest and largest value of each channel, each (C,), of (N, C, ...) or with the channels on another axis.

    Where the channels of a pixel lie side by side, torch reduces over samples and pixels at once with strided reads; over
    the samples first, whole rows are compared, about eight times as fast.
    """
    if axis == 1 and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # (N, H W, C), no copy
        return rows.amin(0).amin(0), rows.amax(0).amax(0)
    axes = [d for d in range(x.ndim) if d != axis]
    return x.amin(axes), x.amax(axes)


def width(low: Tensor, high: Tensor) -> Tensor:
    """Width of each channel's range with zero inside: what an affine int8 scale has to span."""
    return high.clamp_min(0) - low.clamp_max(0)
