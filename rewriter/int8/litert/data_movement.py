"""How operations that move, join and select values are written for LiteRT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriter.int8.annotate import annotation
from rewriter.int8.litert.activations import (
    transpose_plain,
)
from rewriter.int8.litert.arguments import argument, axis_of, numbers
from rewriter.int8.litert.builder import (
    NHWC,
    Emission,
    UnsupportedError,
    Value,
    shape_of,
    source_of,
)
from rewriter.int8.litert.layers import pad
from rewriter.int8.litert.writer import options

Emitter = Callable[[Emission, fx.Node], None]


# ----------------------------------------------------------------------------- moving and joining


def _reshape(e: Emission, node: fx.Node) -> None:
    e.set(node, e.reshape(e.read(source_of(node), node), shape_of(node)))


def _permute(e: Emission, node: fx.Node) -> None:
    x = e.read(source_of(node), node)
    rank = len(x.shape)
    if node.target in ("permute", torch.permute):
        order = [d % rank for d in numbers(node, 1, "dims")]
    else:
        order = list(range(rank))
        a, b = (
            (0, 1)
            if node.target in ("t", torch.t)
            else (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
        )
        order[a], order[b] = order[b], order[a]
    if rank != 4:
        e.set(node, transpose_plain(e, x, order))
        return
    inside = [axis_of(order[d], 4) for d in NHWC]
    if inside == sorted(inside):
        e.set(node, Value(x.index, shape_of(node), x.params))
        return
    e.set(
        node,
        e.op("TRANSPOSE", [x, e.ints(inside)], shape_of(node), x.params, options("Transpose")),
    )


def _getitem(e: Emission, node: fx.Node) -> None:
    source, index = source_of(node), node.args[1]
    if source in e.several:
        found = e.several[source][index]
        if not isinstance(found, Value):
            raise UnsupportedError("several of several tensors")
        e.set(node, found)
        return
    x = e.read(source, node)
    steps: list[Any] = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(isinstance(s, (fx.Node, Tensor)) for s in steps):
        raise UnsupportedError("an index that is computed")
    if Ellipsis in steps:
        at = steps.index(Ellipsis)
        used = sum(s is not None for s in steps) - 1
        steps[at : at + 1] = [slice(None)] * (len(x.shape) - used)
    steps = [s for s in steps if s is not None]
    steps += [slice(None)] * (len(x.shape) - len(steps))
    ranges: list[tuple[int, int, int]] = []
    for size, step in zip(x.shape, steps, strict=True):
        if isinstance(step, slice):
            ranges.append(step.indices(size))
        else:
            ranges.append((step % size, step % size + 1, 1))
    e.set(node, e.reshape(cut(e, x, ranges), shape_of(node)))


def cut(e: Emission, x: Value, ranges: Sequence[tuple[int, int, int]]) -> Value:
    """STRIDED_SLICE by (start, stop, step) of every dimension of torch."""
    if all((a, b, s) == (0, n, 1) for (a, b, s), n in zip(ranges, x.shape, strict=True)):
        return x
    if any(s < 1 for _, _, s in ranges):
        raise UnsupportedError("a slice that runs backwards")
    rank = len(x.shape)
    order = NHWC if rank == 4 else range(rank)
    columns = [e.ints([ranges[d][i] for d in order]) for i in range(3)]
    shape = [len(range(*r)) for r in ranges]
    return e.op("STRIDED_SLICE", [x, *columns], shape, x.params, options("StridedSlice"))


def _split(e: Emission, node: fx.Node) -> None:
    """``chunk``, ``split`` and ``unbind``: slices side by side."""
    x, shapes = e.read(source_of(node), node), node.meta["shape"]
    unbind = node.target in ("unbind", torch.unbind)
    dim = argument(node, 1 if unbind else 2, "dim", 0) % len(x.shape)
    start, parts = 0, []
    for shape in shapes:
        size = 1 if unbind else shape[dim]
        ranges = [(0, n, 1) for n in x.shape]
        ranges[dim] = (start, start + size, 1)
        parts.append(e.reshape(cut(e, x, ranges), shape))
        start += size
    e.several[node] = tuple(parts)


def _cat(e: Emission, node: fx.Node) -> None:
    values, dim = (
        argument(node, 0, "tensors"),
        argument(node, 1, "dim", node.kwargs.get("axis", 0)),
    )
    if not isinstance(values, (tuple, list)):
        raise UnsupportedError("joining something that is no list of tensors")
    parts = [e.read(v, node) for v in values]
    e.set(node, _joined(e, node, parts, dim))


def _joined(e: Emission, node: fx.Node, parts: list[Value], dim: int) -> Value:
    int8 = annotation(node).output is not None and all(p.params is not None for p in parts)
    if int8:
        # int8 kernels join values of one scale alone
        params = e.params(node)
        parts = [e.quantize(p, params) for p in parts]
    else:
        params = None
        parts = [p if p.params is None else e.dequantize(p) for p in parts]
    shape = shape_of(node)
    opts = options("Concatenation", axis=axis_of(dim, len(shape)))
    return e.op("CONCATENATION", parts, shape, params, opts)


def _stack(e: Emission, node: fx.Node) -> None:
    values, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    shape = shape_of(node)
    one = [1 if d == dim % len(shape) else s for d, s in enumerate(shape)]
    parts = [e.reshape(e.read(v, node), one) for v in values]
    e.set(node, _joined(e, node, parts, dim))


def _expand(e: Emission, node: fx.Node) -> None:
    x, shape = e.read(source_of(node), node), shape_of(node)
    x = e.reshape(x, (*[1] * (len(shape) - len(x.shape)), *x.shape))
    times = [o // n for o, n in zip(shape, x.shape, strict=True)]
    if all(t == 1 for t in times):
        e.set(node, x)
        return
    order = NHWC if len(shape) == 4 else range(len(shape))
    repeats = e.ints([times[d] for d in order])
    e.set(node, e.op("TILE", [x, repeats], shape, x.params, options("Tile")))


def _pad(e: Emission, node: fx.Node) -> None:
    widths: Any = argument(node, 1, "pad")
    mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value")
    x = e.read(source_of(node), node)
    if mode != "constant" or value not in (None, 0) or len(x.shape) != 4 or len(widths) > 4:
        raise UnsupportedError("padding other than by zeros around an image")
    left, right, top, bottom = [*widths, 0, 0][:4]
    e.set(node, pad(e, x, (left, right, top, bottom)))


def channel_shuffle(e: Emission, node: fx.Node, groups: int) -> None:
    """Channels (groups, C / groups) -> (C / groups, groups)."""
    x = e.read(source_of(node), node)
    n, c, h, w = x.shape
    # stored as (N, H, W, C): the channels are the last axis
    parts = e.reshape_plain(x, (n * h * w, groups, c // groups))
    swapped = transpose_plain(e, parts, [0, 2, 1])
    made = e.new(x.shape, x.params)
    sizes = (n, h, w, c)
    e.w.op(
        "RESHAPE",
        [swapped.index, e.ints(sizes)],
        [made.index],
        options("Reshape", newShape=np.array(sizes, np.int32)),
    )
    e.set(node, made)


def _channel_shuffle(e: Emission, node: fx.Node) -> None:
    channel_shuffle(e, node, argument(node, 1, "groups"))


def shuffle_module(e: Emission, node: fx.Node, m: nn.ChannelShuffle) -> None:
    channel_shuffle(e, node, m.groups)


def pixel_shuffle(e: Emission, node: fx.Node, m: nn.PixelShuffle) -> None:
    """DEPTH_TO_SPACE takes the channels as (rows, columns, C), torch as (C, rows, columns)."""
    x, r = e.read(source_of(node), node), m.upscale_factor
    n, c, h, w = x.shape
    parts = e.reshape_plain(x, (n * h * w, c // (r * r), r * r))
    swapped = transpose_plain(e, parts, [0, 2, 1])
    moved = e.new(x.shape, x.params)
    sizes = (n, h, w, c)
    e.w.op(
        "RESHAPE",
        [swapped.index, e.ints(sizes)],
        [moved.index],
        options("Reshape", newShape=np.array(sizes, np.int32)),
    )
    e.set(
        node,
        e.op(
            "DEPTH_TO_SPACE",
            [moved],
            shape_of(node),
            x.params,
            options("DepthToSpace", blockSize=r),
        ),
    )


MOVES: dict[str, Emitter] = {
    "cat": _cat,
    "channel_shuffle": _channel_shuffle,
    "expand": _expand,
    "getitem": _getitem,
    "pad": _pad,
    "stack": _stack,
    **dict.fromkeys(("flatten", "reshape", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "t"), _permute),
    **dict.fromkeys(("split", "chunk", "tensor_split", "unbind"), _split),
}
