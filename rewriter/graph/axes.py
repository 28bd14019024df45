"""Which axis of each value holds the inputs of a batch, and which its channels.

Convolutions keep both where every image network has them: (N, C, ...). Transformers turn images into sequences whose
features lie last, and some put the batch second, (L, N, E). What is a channel is decided by the layer that reads or makes
a value: the features of a linear layer or a layer norm are the last axis, those of a convolution the second.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import is_call

_LAST = (nn.Linear, nn.LayerNorm)
_SECOND = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm1d, nn.BatchNorm2d)


def batch_axes(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """The axis of each value that grows with the batch, from the inputs on."""
    found: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        sources = [s for s in node.all_input_nodes if _rank(s) and s.op != "get_attr"]
        rank = _rank(node)
        if not sources or not rank:
            found[node] = 0
            continue
        source = next((s for s in sources if _rank(s) == rank), sources[0])
        axis = found[source]
        if node.target == "reshape":
            sizes = list(node.args[1:])
            axis = sizes.index(-1) if -1 in sizes else 0
        else:
            moved = _moved(node, source)
            if moved is not None:
                axis = moved.index(axis) if axis in moved else 0
            elif _rank(source) != rank:
                axis = 0
        found[node] = min(axis, rank - 1)
    return found


def channel_axes(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """The axis of each value that holds its channels or features; 0 where a value has one axis only."""
    batch = batch_axes(gm)
    found: dict[fx.Node, int] = {}
    nodes = [n for n in gm.graph.nodes if _rank(n)]
    for node in nodes:
        if is_call(gm, node, *_LAST):
            found[node] = _rank(node) - 1
        elif is_call(gm, node, *_SECOND):
            found[node] = min(1, _rank(node) - 1)
    for node in reversed(nodes):  # who reads a value says what its channels are
        for reader in node.users if node not in found else ():
            if is_call(gm, reader, *_LAST):
                found[node] = _rank(node) - 1
            elif is_call(gm, reader, *_SECOND):
                found[node] = min(1, _rank(node) - 1)
            elif reader in found and _rank(reader):
                axis = _before(gm, node, reader, found[reader])
                if axis is not None:
                    found[node] = axis
            if node in found:
                break
    for node in nodes:
        if node not in found:
            found[node] = _after(gm, node, found, batch[node])
    return found


def _rank(node: fx.Node) -> int:
    shape = facts.SHAPE.get(node)
    plain = isinstance(shape, tuple) and all(isinstance(v, int) for v in shape)
    return len(shape) if plain and node.op != "output" else 0


def _before(gm: fx.GraphModule, node: fx.Node, reader: fx.Node, axis: int) -> int | None:
    """The axis of ``node`` that becomes ``axis`` of its reader; None where that is not known."""
    moved = _moved(reader, node)
    if moved is not None:
        return moved[axis]
    return axis if _keeps(gm, node, reader) else None


def _after(gm: fx.GraphModule, node: fx.Node, found: dict[fx.Node, int], batch: int) -> int:
    for source in node.all_input_nodes:
        if source not in found:
            continue
        moved = _moved(node, source)
        if moved is not None and found[source] in moved:
            return moved.index(found[source])
        if moved is None and _keeps(gm, source, node):
            return found[source]
    rank = _rank(node)
    return 0 if rank == 1 else (1 if batch != 1 else rank - 1)


def _keeps(gm: fx.GraphModule, source: fx.Node, node: fx.Node) -> bool:
    """Whether channels stay where they are: the same shape, or pooling and resizing of a picture."""
    if facts.SHAPE.of(source) == facts.SHAPE.of(node) and node.target not in (
        "reshape",
        "permute",
    ):
        return True
    alike = _rank(source) == _rank(node) and facts.SHAPE.of(source)[:2] == facts.SHAPE.of(node)[:2]
    return alike and node.op == "call_module" and not is_call(gm, node, *_LAST)


def _moved(node: fx.Node, source: fx.Node) -> list[int] | None:
    """For each axis of ``node`` the axis of ``source`` that it was; None where axes are not just moved.

    An axis that is new is -1.
    """
    rank = _rank(source)
    dims: list[int] = list(range(rank))
    args: Any = node.args
    if node.args and node.args[0] is not source:
        return None
    if node.target == "permute":
        return [int(d) for d in args[1:]]
    if node.target == "transpose":
        a, b = args[1], args[2]
        dims[a], dims[b] = dims[b], dims[a]
        return dims
    if node.target in ("unsqueeze", torch.unsqueeze):
        place = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
        dims.insert(int(place) % (rank + 1), -1)
        return dims
    if node.target is operator.getitem:
        return _indexed(args[1], dims)
    return None


def _indexed(index: Any, dims: list[int]) -> list[int] | None:
    parts = index if isinstance(index, tuple) else (index,)
    if any(p is Ellipsis or not (p is None or isinstance(p, (int, slice))) for p in parts):
        return None
    left, found = list(dims), []
    for part in parts:
        if part is None:
            found.append(-1)
        elif isinstance(part, slice):
            found.append(left.pop(0))
        else:
            left.pop(0)
    return found + left
