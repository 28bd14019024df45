"""Sizes and dimensions of the normal form: plain numbers wherever the batch allows it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.graph import facts
from rewriter.graph.interpret import propagate_shapes

_RESHAPES = ("reshape", "reshape_as", "unflatten")
_PARTS = (
    *("chunk", "split", "tensor_split", "split_with_sizes", "unbind"),
    *(torch.chunk, torch.split, torch.tensor_split, torch.split_with_sizes, torch.unbind),
)


def fix_sizes(gm: fx.GraphModule) -> None:
    """``reshape`` gets plain sizes with one -1 for the batch: no size is computed in the graph.

    ``squeeze`` without a dimension, whose meaning depends on the batch, becomes such a reshape
    too.
    """
    gm.recompile()
    two, three = (_shapes(gm, batch) for batch in (2, 3))
    for node in gm.graph.nodes:
        if node.op == "call_module":  # which may well be called squeeze
            continue
        if node.op == "call_method" and node.target in _RESHAPES:
            pass
        elif (
            node.target not in ("squeeze", torch.squeeze) or len(node.args) + len(node.kwargs) > 1
        ):
            continue
        a, b = two[node.name], three[node.name]
        if a is None or b is None or len(a) != len(b):
            continue
        varies = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        if len(varies) <= 1:
            node.op, node.target, node.kwargs = "call_method", "reshape", {}
            node.args = (node.args[0], *[-1 if i in varies else s for i, s in enumerate(a)])


def _shapes(gm: fx.GraphModule, batch: int) -> dict[str, tuple[int, ...] | None]:
    found: dict[str, tuple[int, ...] | None] = {}

    class Sizes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            found[n.name] = tuple(value.shape) if isinstance(value, Tensor) else None
            return value

    with torch.no_grad():
        Sizes(gm).run(*[torch.zeros(batch, *s) for s in facts.EXAMPLE.of(gm)])
    return found


def slices_for_parts(gm: fx.GraphModule) -> None:
    """``chunk``, ``split`` and ``unbind`` become slices, so that every value is a tensor."""
    gm.recompile()
    propagate_shapes(gm)
    for node in list(gm.graph.nodes):
        if node.op not in ("call_method", "call_function") or node.target not in _PARTS:
            continue
        if any(u.target is not operator.getitem or not _index(u) for u in node.users):
            continue
        alone = node.target in ("unbind", torch.unbind)
        place = 1 if alone else 2
        dim = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
        dim %= len(facts.SHAPE.of(node.args[0]))
        if dim == 0:
            continue  # the batch
        widths = [1 if alone else shape[dim] for shape in facts.SHAPE.of(node)]
        for user in list(node.users):
            i = user.args[1] % len(widths)
            start = sum(widths[:i])
            part = start if alone else slice(start, start + widths[i])
            user.args = (node.args[0], (*[slice(None)] * dim, part))
        gm.graph.erase_node(node)


def _index(node: fx.Node) -> bool:
    return type(node.args[1]) is int


def plain_dimensions(gm: fx.GraphModule) -> None:
    """cat, flatten, mean, permute and transpose get positional dimensions >= 0, in place."""
    gm.recompile()
    propagate_shapes(gm)
    for node in gm.graph.nodes:
        source = node.args[0] if node.args else None
        if node.target is torch.cat and isinstance(source, (tuple, list)) and source:
            rank = len(facts.SHAPE.of(node))
            dim = _given(node, 1, "dim", _given(node, 2, "axis", 0))
            node.args, node.kwargs = (list(source), dim % rank), {}
        if not isinstance(source, fx.Node) or not facts.DTYPE.known(source):
            continue
        rank = len(facts.SHAPE.of(source))
        if node.target is torch.flatten:
            start, end = _given(node, 1, "start_dim", 0), _given(node, 2, "end_dim", -1)
            node.args, node.kwargs = (source, start % rank, end % rank), {}
        elif node.target is torch.mean and node.kwargs.get("dtype") is None:
            _plain_mean(node, source, rank)
        elif node.op == "call_method" and node.target == "permute":
            dims = node.kwargs.get("dims", node.args[1:])
            dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
            node.args, node.kwargs = (source, *[d % rank for d in dims]), {}
        elif node.op == "call_method" and node.target == "transpose":
            a, b = _given(node, 1, "dim0", 0), _given(node, 2, "dim1", 1)
            node.args, node.kwargs = (source, a % rank, b % rank), {}


def _plain_mean(node: fx.Node, source: fx.Node, rank: int) -> None:
    dims = _given(node, 1, "dim", node.kwargs.get("axis"))
    if dims is None:
        return  # over everything, the batch too
    dims = (dims,) if isinstance(dims, int) else dims
    keep = bool(_given(node, 2, "keepdim", False))
    node.args, node.kwargs = (source, tuple(sorted(d % rank for d in dims)), keep), {}


def _given(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
