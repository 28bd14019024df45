"""The parts of a network's int8 error, and the layer or value that each belongs to.

A part is the rounded weight of a layer, or an edge: one value as one reader sees it rounded.
Moving a value (reshape, max pool, ...) commutes with rounding, so an edge is counted where the
moved value is used.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rewriter.graph.lookup import layers
from rewriter.int8.annotate import annotation, is_layer, moves_values

# (reader, value), names of nodes
Edge = tuple[str, str]


@dataclass(frozen=True)
class Parts:
    """The parts of the int8 error of one annotated graph, by node name.

    Args:
        rounded: by reader, the arguments that are rounded there.
        inputs: by layer, the edges through which it reads.
        returned: by layer, the edges at which its result is rounded and read by no int8 operation:
            a head's, at the graph's output or before what is computed in float.
        values: by value, the edges that carry it, moved or not.
    """

    rounded: dict[str, tuple[str, ...]]
    inputs: dict[str, tuple[Edge, ...]]
    returned: dict[str, tuple[Edge, ...]]
    values: dict[str, tuple[Edge, ...]]


def parts_of(gm: fx.GraphModule) -> Parts:
    """The parts of the int8 error of an annotated graph."""
    moving = {n for n in gm.graph.nodes if n.op != "output" and moves_values(gm, n)}
    rounded: dict[str, tuple[str, ...]] = {}
    values: dict[str, list[Edge]] = {}
    returned: dict[str, list[Edge]] = {}
    for node in gm.graph.nodes:
        if node in moving and not _feeds_float(node, moving):
            continue
        reads = annotation(node).reads
        found = [n for n in node.all_input_nodes if n.name in reads]
        if not found:
            continue
        rounded[node.name] = tuple(n.name for n in found)
        for value in found:
            edge = (node.name, value.name)
            values.setdefault(_origin(value, moving).name, []).append(edge)
            maker = _maker(gm, value, moving)
            if maker is not None and (node.op == "output" or node in moving):
                returned.setdefault(maker.name, []).append(edge)
    weighted = [n for n in layers(gm) if annotation(n).weight is not None]
    return Parts(
        rounded,
        {n.name: tuple((n.name, v) for v in annotation(n).reads) for n in weighted},
        {n.name: tuple(returned.get(n.name, ())) for n in weighted},
        {k: tuple(v) for k, v in values.items()},
    )


def _feeds_float(node: fx.Node, moving: set[fx.Node]) -> bool:
    """Whether what a node moves in int8 is then used in float."""
    return bool(annotation(node).reads) and any(
        user not in moving and user.op != "output" and node.name not in annotation(user).reads
        for user in node.users
    )


def _origin(value: fx.Node, moving: set[fx.Node]) -> fx.Node:
    """The value that was rounded, before it was moved in int8."""
    while value in moving and annotation(value).reads:
        name = annotation(value).reads[0]
        value = next(n for n in value.all_input_nodes if n.name == name)
    return value


def _maker(gm: fx.GraphModule, node: fx.Node, moving: set[fx.Node]) -> fx.Node | None:
    """The layer whose result a value is, behind moves and the activation its kernel computes."""
    while not is_layer(gm, node):
        before = node.all_input_nodes
        if len(before) != 1:
            return None
        fused = node.op == "call_module" and annotation(before[0]).output is None
        if node not in moving and not fused:
            return None
        node = before[0]
    return node
