"""The range of every channel of every value of a float graph."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from rewriter.graph import facts
from rewriter.graph.axes import channel_axes
from rewriter.graph.interpret import clips_in_place, propagate_shapes, walk

Range = tuple[Tensor, Tensor]
# Marks of tensors that are still alive, with the version counters they were made at.
_marks: WeakIdKeyDictionary = WeakIdKeyDictionary()


def profile(
    gm: fx.GraphModule,
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    only: Collection[fx.Node] | None = None,
) -> None:
    """Write ``facts.CHANNEL_RANGE``, (low, high), each (C,), at every value, in place.

    Channels are those of ``rewriter.graph.axes.channel_axes``.

    Args:
        gm: canonical graph.
        batches: calibration inputs (N, ...), or a tuple with one tensor for each input.
        only: nodes whose values are not known yet, where those of all others are, on the same inputs; None: all.
    """
    axes, clips = channel_axes(gm), clips_in_place(gm)
    marks = list(facts.PROFILED.get(gm, ()))[1:]
    if only is not None:
        marks = []
    elif not marks and any(facts.CHANNEL_RANGE.known(n) for n in gm.graph.nodes):
        marks.append(math.nan)  # ranges of unknown inputs are among them, and stay there
    with torch.no_grad():
        for batch in batches:
            inputs = batch if isinstance(batch, tuple) else (batch,)
            marks += input_marks([inputs])
            seen: dict[fx.Node, Range] = {}
            for node, value in walk(gm, inputs, True, only):
                if only is not None and node not in only:
                    continue
                if not isinstance(value, Tensor) or value.ndim < 2 or node.op == "get_attr":
                    continue
                if not value.is_floating_point():
                    continue
                source = node.args[0] if node in clips else None
                if source in seen and axes.get(source, 1) == axes.get(node, 1):
                    # what a clip makes of the ends is what it makes of the values there
                    low, high = (end.clamp(*clips[node]) for end in seen[source])  # type: ignore[index]
                else:
                    low, high = channel_range(value, axes.get(node, 1))
                found = seen[node] = low.cpu(), high.cpu()
                if facts.CHANNEL_RANGE.known(node):
                    found = hull(facts.CHANNEL_RANGE.of(node), found)
                facts.CHANNEL_RANGE.put(node, found)
    facts.PROFILED.put(gm, (weight_mark(gm), *marks))


def has_ranges_of(
    gm: fx.GraphModule, batches: Iterable[Tensor | tuple[Tensor, ...]] | None = None
) -> bool:
    """Whether the nodes know the ranges of the network as it is now, on these inputs and no others (None: on whatever inputs)."""
    marks = facts.PROFILED.get(gm)
    if marks is None or marks[0] != weight_mark(gm):
        return False
    return batches is None or marks[1:] == tuple(input_marks(batches))


def weight_mark(gm: fx.GraphModule) -> float:
    """A number that changes with the weights."""
    sums = [float(t.detach().sum()) for t in gm.state_dict(keep_vars=True).values()]
    return sum(s * (1 + i / 7) for i, s in enumerate(sums))


def input_marks(batches: Iterable[Tensor | tuple[Tensor, ...]]) -> list[float]:
    """What tells some calibration inputs from others: their number and two sums for each tensor."""
    found: list[float] = []
    for batch in batches:
        for x in batch if isinstance(batch, tuple) else (batch,):
            known = _marks.get(x)
            if known is None or known[0] != x._version:
                known = _marks[x] = (x._version, _mark(x))
            found += known[1]
    return found


def _mark(x: Tensor) -> list[float]:
    rows = x.detach().double().flatten(1) if len(x) else x.detach().double().view(0, 0)
    places = torch.linspace(1, 2, rows.shape[1], dtype=torch.float64, device=x.device)
    return [float(len(x)), float(rows.sum()), float((rows @ places).sum())]


def range_of(node: fx.Node, channels: int) -> Range | None:
    """What ``profile`` saw of a value with so many channels; None where that is not known.

    A range of another length belongs to what stood here before a step changed it.
    """
    known = facts.CHANNEL_RANGE.get(node)
    return known if known is not None and len(known[0]) == channels else None


def describe(gm: fx.GraphModule) -> None:
    """Write the shapes that values have now; channel ranges of a value that has other channels are forgotten.

    A rule knows what it makes, but not what a split does to all that lies behind, such as a flattened map.
    """
    propagate_shapes(gm)
    for node, axis in channel_axes(gm).items():
        if range_of(node, facts.SHAPE.of(node)[axis]) is None:
            facts.CHANNEL_RANGE.drop(node)


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
