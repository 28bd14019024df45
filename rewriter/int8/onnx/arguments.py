"""Arguments of the calls of a graph, by position or by name, and the pads that several emitters need."""

from __future__ import annotations

from typing import Any

from torch import fx

from rewriter.graph import facts
from rewriter.int8.onnx.builder import Emission, UnsupportedError


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a function or method call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def first(node: fx.Node) -> fx.Node:
    """The first argument, which must be a value of the graph."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        raise UnsupportedError("first argument is no value of the graph")
    return node.args[0]


def rank(node: fx.Node) -> int:
    """The number of dimensions of a node's value, which must be one tensor."""
    shape = facts.SHAPE.get(node)
    if not isinstance(shape, tuple) or (shape and not isinstance(shape[0], int)):
        raise UnsupportedError(f"{node.name} is not one tensor")
    return len(shape)


def numbers(node: fx.Node, start: int, name: str) -> list[Any]:
    """Numbers given as separate arguments, as one list, or by name."""
    rest: Any = node.args[start:] or node.kwargs.get(name, ())
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        rest = rest[0]
    return list(rest)


def axes(node: fx.Node, dims: Any) -> list[int]:
    """Dimensions of the first argument, counted from the front; all if ``dims`` names none."""
    count = rank(first(node))
    if dims is None or dims == () or dims == []:
        return list(range(count))
    return [d % count for d in ([dims] if isinstance(dims, int) else dims)]


def source_of(node: fx.Node) -> fx.Node:
    """The value that a module reads."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        raise UnsupportedError("input is no value of the graph")
    return source


def pad(e: Emission, x: str, pads: list[int], mode: str = "constant", value: float = 0.0) -> str:
    """Pad ``x`` by ``pads`` (all begins, then all ends)."""
    fill = [e.scalar(value)] if mode == "constant" else []
    return e.op("Pad", x, e.ints(pads), *fill, mode=mode)
