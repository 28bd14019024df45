"""Arguments of the function and method calls of a graph, and where dimensions lie in the file."""

from __future__ import annotations

from typing import Any

from torch import fx

from rewriter.int8.litert.builder import NHWC


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def numbers(node: fx.Node, start: int, name: str) -> list[int]:
    rest: Any = node.args[start:] or node.kwargs.get(name, ())
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        rest = rest[0]
    return list(rest)


def axis_of(dim: int, rank: int) -> int:
    """Where a dimension of torch lies in the file."""
    return NHWC.index(dim % rank) if rank == 4 else dim % rank
