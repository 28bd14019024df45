"""How operations that move, join and select values are written in ONNX."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from torch import fx

from rewriter.graph import facts
from rewriter.int8.onnx.arguments import argument, axes, first, numbers, pad, rank
from rewriter.int8.onnx.builder import Emission, UnsupportedError, Value
from rewriter.int8.onnx.modules import channel_shuffle

Emitter = Callable[[Emission, fx.Node], Value]

_TO_THE_END = sys.maxsize


# ----------------------------------------------------------------------------- moving and joining


def _reshape(e: Emission, node: fx.Node) -> Value:
    return e.op("Reshape", e.read(first(node), node), e.ints(numbers(node, 1, "shape")))


def _flatten(e: Emission, node: fx.Node) -> Value:
    source = first(node)
    dims = rank(source)
    if dims == 0:
        return e.op("Reshape", e.read(source, node), e.ints([1]))
    start = argument(node, 1, "start_dim", 0) % dims
    stop = argument(node, 2, "end_dim", -1) % dims
    x = e.read(source, node)
    if start == 1 and stop == dims - 1:
        return e.op("Flatten", x, axis=1)
    shape = facts.SHAPE.of(source)
    middle = -1 if start == 0 else math.prod(shape[start : stop + 1])
    return e.op("Reshape", x, e.ints([*[0] * start, middle, *shape[stop + 1 :]]))


def _permute(e: Emission, node: fx.Node) -> Value:
    order = [d % rank(first(node)) for d in numbers(node, 1, "dims")]
    return e.op("Transpose", e.read(first(node), node), perm=order)


def _transpose(e: Emission, node: fx.Node) -> Value:
    order = list(range(rank(first(node))))
    a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    if node.target in ("t", torch.t):
        a, b = 0, 1
    order[a], order[b] = order[b], order[a]
    return e.op("Transpose", e.read(first(node), node), perm=order)


def _attribute(e: Emission, node: fx.Node) -> Value:
    """``x.T`` and ``x.mT``."""
    order = list(range(rank(first(node))))
    if node.args[1] not in ("T", "mT") or len(order) < 2:
        raise UnsupportedError(f"attribute {node.args[1]}")
    if node.args[1] == "T":
        order.reverse()
    else:
        order[-2:] = order[:-3:-1]
    return e.op("Transpose", e.read(first(node), node), perm=order)


def _channel_shuffle(e: Emission, node: fx.Node) -> Value:
    groups: Any = argument(node, 1, "groups")
    return channel_shuffle(e, node, e.read(first(node), node), groups)


def _squeeze(e: Emission, node: fx.Node) -> Value:
    source, dims = first(node), argument(node, 1, "dim")
    shape = facts.SHAPE.of(source)
    if dims is None:
        raise UnsupportedError("squeeze without a dimension, which may be the batch")
    ones = [a for a in axes(node, dims) if shape[a] == 1]
    x = e.read(source, node)
    return e.op("Squeeze", x, e.ints(ones)) if ones else x


def _unsqueeze(e: Emission, node: fx.Node) -> Value:
    axis = argument(node, 1, "dim") % (rank(first(node)) + 1)
    return e.op("Unsqueeze", e.read(first(node), node), e.ints([axis]))


def _expand(e: Emission, node: fx.Node) -> Value:
    sizes = [1 if isinstance(s, int) and s == -1 else s for s in numbers(node, 1, "size")]
    return e.op("Expand", e.read(first(node), node), e.ints(sizes))


def _expand_as(e: Emission, node: fx.Node) -> Value:
    other = argument(node, 1, "other")
    return e.op("Expand", e.read(first(node), node), e.op("Shape", e.read(other)))


def _repeat(e: Emission, node: fx.Node) -> Value:
    times, x = numbers(node, 1, "repeats"), e.read(first(node), node)
    new = len(times) - rank(first(node))
    if new > 0:
        x = e.op("Unsqueeze", x, e.ints(list(range(new))))
    return e.op("Tile", x, e.ints(times))


def _joined(e: Emission, node: fx.Node) -> tuple[list[fx.Node], list[str], int]:
    """The tensors that ``cat`` or ``stack`` joins, their names, and the dimension."""
    values, dim = (
        argument(node, 0, "tensors"),
        argument(node, 1, "dim", node.kwargs.get("axis", 0)),
    )
    if not isinstance(values, (tuple, list)) or not all(isinstance(v, fx.Node) for v in values):
        raise UnsupportedError("joining something that is no list of tensors")
    sources: list[fx.Node] = list(values)
    if len({facts.DTYPE.get(v) for v in sources}) != 1:
        raise UnsupportedError("joining tensors of several types")
    return sources, [e.read(v, node) for v in sources], dim


def _cat(e: Emission, node: fx.Node) -> Value:
    sources, names, dim = _joined(e, node)
    return e.op("Concat", *names, axis=dim % rank(sources[0]))


def _stack(e: Emission, node: fx.Node) -> Value:
    sources, names, dim = _joined(e, node)
    axis = dim % (rank(sources[0]) + 1)
    parts = [e.op("Unsqueeze", n, e.ints([axis])) for n in names]
    return e.op("Concat", *parts, axis=axis)


def _parts(e: Emission, node: fx.Node, dim: int, sizes: list[int]) -> tuple[str, ...]:
    if dim == 0:
        raise UnsupportedError("splitting the batch")
    x = e.read(first(node), node)
    return e.op_many("Split", [x, e.ints(sizes)], len(sizes), axis=dim)


def _split(e: Emission, node: fx.Node) -> Value:
    """``chunk``, ``split`` and ``tensor_split`` along a dimension that is not the batch."""
    dim = argument(node, 2, "dim", 0) % rank(first(node))
    return _parts(e, node, dim, [shape[dim] for shape in facts.SHAPE.of(node)])


def _unbind(e: Emission, node: fx.Node) -> Value:
    dim = argument(node, 1, "dim", 0) % rank(first(node))
    parts = _parts(e, node, dim, [1] * len(facts.SHAPE.of(node)))
    return tuple(e.op("Squeeze", p, e.ints([dim])) for p in parts)


def _pad(e: Emission, node: fx.Node) -> Value:
    widths: Any = argument(node, 1, "pad")
    mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value")
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    if any(isinstance(w, fx.Node) for w in widths):
        raise UnsupportedError("padding computed in the graph")
    dims = rank(first(node))
    begin, end = [0] * dims, [0] * dims
    for i in range(len(widths) // 2):  # torch lists pairs from the last dimension on
        begin[dims - 1 - i], end[dims - 1 - i] = widths[2 * i], widths[2 * i + 1]
    x = e.read(first(node), node)
    return pad(e, x, begin + end, modes[mode], 0.0 if value is None else float(value))


# -------------------------------------------------------------------------------------- indexing


def _getitem(e: Emission, node: fx.Node) -> Value:
    source, index = first(node), node.args[1]
    value = e.values[source]
    if isinstance(value, tuple):
        if not isinstance(index, (int, slice)):
            raise UnsupportedError(f"index {index!r} of several tensors")
        return value[index]
    steps: list[Any] = list(index) if isinstance(index, (tuple, list)) else [index]
    if Ellipsis in [s for s in steps if not isinstance(s, fx.Node)]:
        at = next(i for i, s in enumerate(steps) if s is Ellipsis)
        used = sum(s is not None for s in steps) - 1
        steps[at : at + 1] = [slice(None)] * (rank(source) - used)
    return _index(e, e.read(source, node), steps)


def _index(e: Emission, x: str, steps: list[Any]) -> str:
    slices, picks, new, axis, place = [], [], [], 0, 0
    for step in steps:
        if step is None:
            new.append(place)
            place += 1
            continue
        if isinstance(step, slice):
            if step != slice(None):
                slices.append((axis, step))
            place += 1
        elif isinstance(step, int) and not isinstance(step, bool):
            picks.append((axis, step))
        elif isinstance(step, fx.Node) and facts.DTYPE.get(step) is torch.int64:
            if sum(isinstance(s, fx.Node) for s in steps) > 1 or picks:
                raise UnsupportedError("several index tensors")
            if facts.SHAPE.of(step) and len(facts.SHAPE.of(step)) > 1:
                raise UnsupportedError("an index tensor with several dimensions")
            x = e.op("Gather", x, e.read(step), axis=axis)
            place += 1
        else:
            raise UnsupportedError(f"index {step!r}")
        axis += 1
    if slices:
        columns = [
            [0 if s.start is None else s.start for _, s in slices],
            [_TO_THE_END if s.stop is None else s.stop for _, s in slices],
            [a for a, _ in slices],
            [1 if s.step is None else s.step for _, s in slices],
        ]
        x = e.op("Slice", x, *[e.ints(c) for c in columns])
    for at, pick in reversed(picks):
        x = e.op("Gather", x, e.constant(np.array(pick, dtype=np.int64), "index"), axis=at)
    return e.op("Unsqueeze", x, e.ints(new)) if new else x


def _index_select(e: Emission, node: fx.Node) -> Value:
    dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
    (axis,) = axes(node, dim)
    return e.op("Gather", e.read(first(node), node), e.read(index), axis=axis)


def _gather(e: Emission, node: fx.Node) -> Value:
    dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
    (axis,) = axes(node, dim)
    return e.op("GatherElements", e.read(first(node), node), e.read(index), axis=axis)


def _size(e: Emission, node: fx.Node) -> Value:
    dim = argument(node, 1, "dim")
    if dim is None:
        raise UnsupportedError("all sizes at once")
    sizes = e.op("Shape", e.read(first(node)))
    return e.op("Gather", sizes, e.constant(np.array(dim, dtype=np.int64), "index"), axis=0)


def _filled(value: float | None, start: int) -> Emitter:
    """``zeros``, ``ones`` and ``full`` of sizes, one of which may be the batch; None: the value is given."""

    def emit(e: Emission, node: fx.Node) -> Value:
        fill = argument(node, start + 1, "fill_value") if value is None else value
        given = node.args[start : start + 1] if value is None else node.args[start:]
        given = given or (node.kwargs.get("size", ()),)
        sizes: Any = given[0] if len(given) == 1 else given
        if not isinstance(fill, (int, float)):
            raise UnsupportedError("a fill value that is computed")
        array = torch.tensor([fill], dtype=facts.DTYPE.of(node)).numpy()
        shape = e.ints(list(sizes) if isinstance(sizes, (tuple, list)) else [sizes])
        return e.op("ConstantOfShape", shape, value=numpy_helper.from_array(array))

    return emit


MOVES: dict[str, Emitter] = {
    "zeros": _filled(0.0, 0),
    "ones": _filled(1.0, 0),
    "full": _filled(None, 0),
    "new_zeros": _filled(0.0, 1),
    "new_ones": _filled(1.0, 1),
    "new_full": _filled(None, 1),
    **dict.fromkeys(("transpose", "swapaxes", "t"), _transpose),
    **dict.fromkeys(("split", "chunk", "tensor_split"), _split),
    "cat": _cat,
    "channel_shuffle": _channel_shuffle,
    "expand": _expand,
    "expand_as": _expand_as,
    "flatten": _flatten,
    "gather": _gather,
    "getattr": _attribute,
    "getitem": _getitem,
    "index_select": _index_select,
    "pad": _pad,
    "permute": _permute,
    "repeat": _repeat,
    "reshape": _reshape,
    "size": _size,
    "squeeze": _squeeze,
    "stack": _stack,
    "unbind": _unbind,
    "unsqueeze": _unsqueeze,
}
