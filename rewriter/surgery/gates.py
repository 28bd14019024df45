"""Squeeze-and-excitation gates: what is computed of the mean of a map, and multiplies its channels.

x -> mean over places -> layer -> activation -> layer -> sigmoid -> g (N, C, 1, 1);  y = x g
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import is_call
from rewriter.int8.annotate import is_layer, moves_values


@dataclass(frozen=True)
class Gated:
    """A product with a gate.

    Args:
        product: the multiplication.
        value: the map that is multiplied.
        gate: what it is multiplied with, (N, C, 1, 1).
        chain: the gate's operations, in graph order, from the mean on.
    """

    product: fx.Node
    value: fx.Node
    gate: fx.Node
    chain: tuple[fx.Node, ...]

    def layers(self, gm: fx.GraphModule) -> list[fx.Node]:
        """Its layers, in graph order."""
        return [n for n in self.chain if is_layer(gm, n)]


def gates(gm: fx.GraphModule) -> Iterator[Gated]:
    """Every product with a gate, in graph order."""
    for node in gm.graph.nodes:
        if node.target is not operator.mul or len(node.all_input_nodes) != 2:
            continue
        for gate, value in (node.args, node.args[::-1]):
            if not isinstance(gate, fx.Node) or not isinstance(value, fx.Node):
                continue
            chain = _chain(gm, gate)
            if chain and _shape(gate)[2:] == (1, 1) and _shape(gate)[1] == _shape(value)[1]:
                yield Gated(node, value, gate, tuple(chain))
                break


def _shape(node: fx.Node) -> tuple[int, ...]:
    shape = facts.SHAPE.get(node)
    return shape if isinstance(shape, tuple) and len(shape) == 4 else (0, 0, 0, 0)


def _chain(gm: fx.GraphModule, gate: fx.Node) -> list[fx.Node]:
    """The operations of a gate back to the mean over places; empty where there is none, or no layer on the way."""
    chain: list[fx.Node] = []
    node = gate
    while len(chain) < 16 and node.op not in ("placeholder", "get_attr"):
        chain.append(node)
        if is_call(gm, node, nn.AdaptiveAvgPool2d, nn.AvgPool2d) or node.target is torch.mean:
            chain.reverse()
            weighted = any(is_layer(gm, n) for n in chain)
            squeezed = all(s == 1 for s in facts.SHAPE.of(node)[2:])
            return chain if weighted and squeezed else []
        if len(node.all_input_nodes) != 1:
            return []
        known = node.op == "call_module" or moves_values(gm, node)
        if not known and node.target not in (operator.add, operator.mul):
            return []
        (node,) = node.all_input_nodes
    return []
