"""Assignment to a part of a tensor, ``y[..., 0:2] = v``, as a concatenation of slices.

Detectors decode their boxes so in place. While tracing it is a node ``assign_`` like any other
in-place operation; the normal form has the parts that stay and the part that is new side by side:

    y[:, a:b] = v        ->        cat([y[:, :a], v, y[:, b:]], 1)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.graph import facts

# First and last (exclusive) place in each dimension, and the dimensions that an integer takes out.
Spans = tuple[list[tuple[int, int]], list[int]]


def assign_(x: Tensor, index: Any, value: Any) -> Tensor:
    """``x[index] = value``, in place."""
    x[index] = value
    return x


def spans(shape: tuple[int, ...], index: Any) -> Spans | None:
    """What part of a tensor an index means; None where it is no box of neighboring elements.

    Args:
        shape: of the tensor, batch first; a part of the batch is no constant of the model.
        index: integers, slices and an ellipsis.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    missing = len(shape) - (len(items) - len(dots))
    if len(dots) > 1 or missing < 0:
        return None
    at = dots[0] if dots else len(items)
    items[at : at + len(dots)] = [slice(None)] * missing
    found: list[tuple[int, int]] = []
    taken: list[int] = []
    for dim, (size, item) in enumerate(zip(shape, items, strict=True)):
        if type(item) is int and dim and -size <= item < size:
            found.append((item % size, item % size + 1))
            taken.append(dim)
        elif type(item) is slice and all(
            type(end) in (int, type(None)) for end in (item.start, item.stop, item.step)
        ):
            if item.step not in (None, 1) or (not dim and item != slice(None)):
                return None
            low, high, _ = item.indices(size)
            found.append((low, max(low, high)))
        else:
            return None
    return found, taken


def expand_assignments(gm: fx.GraphModule) -> None:
    """Replace every ``assign_`` of a traced graph by slices and a concatenation; edits gm."""
    for node in list(gm.graph.nodes):
        if node.target is not assign_:
            continue
        x, index, value = node.args
        found = spans(facts.SHAPE.of(x), index)
        assert found is not None, index  # the tracer refuses others
        with gm.graph.inserting_before(node):
            new = _assigned(gm, x, found, value)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _assigned(gm: fx.GraphModule, x: fx.Node, found: Spans, value: Any, dim: int = 0) -> fx.Node:
    """``x`` with the new part, from dimension ``dim`` on."""
    places, taken = found
    shape = facts.SHAPE.of(x)
    while dim < len(shape) and places[dim] == (0, shape[dim]):
        dim += 1
    if dim == len(shape):
        return _shaped(gm, x, taken, value)
    low, high = places[dim]
    parts = [_part(gm, x, dim, low, high)]
    parts[0] = _assigned(gm, parts[0], found, value, dim + 1)
    if low:
        parts.insert(0, _part(gm, x, dim, 0, low))
    if high < shape[dim]:
        parts.append(_part(gm, x, dim, high, shape[dim]))
    new = gm.graph.call_function(torch.cat, (parts, dim))
    _inherit(new, x, shape)
    return new


def _part(gm: fx.GraphModule, x: fx.Node, dim: int, low: int, high: int) -> fx.Node:
    shape = facts.SHAPE.of(x)
    index = (*[slice(None)] * dim, slice(low, high))
    part = gm.graph.call_function(operator.getitem, (x, index))
    _inherit(part, x, (*shape[:dim], high - low, *shape[dim + 1 :]))
    return part


def _inherit(new: fx.Node, x: fx.Node, shape: tuple[int, ...]) -> None:
    facts.keep(new, x, facts.DTYPE, facts.MODULE_STACK)
    facts.SHAPE.put(new, shape)


def _shaped(gm: fx.GraphModule, part: fx.Node, taken: list[int], value: Any) -> fx.Node:
    """The new values in the shape of the part that they replace."""
    if not isinstance(value, fx.Node):
        made = gm.graph.call_function(torch.full_like, (part, value))
        _inherit(made, part, facts.SHAPE.of(part))
        return made
    shape = facts.SHAPE.get(value)
    if shape is None:
        shape = tuple(operator.attrgetter(str(value.target))(gm).shape)
    rank = len(facts.SHAPE.of(part))
    for dim in taken:  # an integer index takes the dimension out: counted from the last
        behind = rank - 1 - dim - sum(t > dim for t in taken)
        if behind > len(shape):
            continue  # broadcasting adds it
        at = len(shape) - behind
        shape = (*shape[:at], 1, *shape[at:])
        value = gm.graph.call_method("unsqueeze", (value, at))
        _inherit(value, part, shape)
    if shape == facts.SHAPE.of(part):
        return value
    value = gm.graph.call_method("expand_as", (value, part))
    _inherit(value, part, facts.SHAPE.of(part))
    return value
