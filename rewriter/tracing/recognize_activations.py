"""Activations that the user wrote out by hand, recognised by what they compute.

relu6(x + 3) / 6, clamp(x + 3, 0, 6) * (1 / 6)      Hardsigmoid
x * hardsigmoid(x), x * relu6(x + 3) / 6            Hardswish
x * sigmoid(x)                                      SiLU
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import add_module
from rewriter.graph.lookup import is_call


def recognise_activations(gm: fx.GraphModule) -> None:
    """Put one module in the place of each activation written by hand; edits gm in place."""
    for node in list(gm.graph.nodes):
        found = _hard(gm, node) or _gated(gm, node)
        if found is None:
            continue
        kind, x, inner = found
        _replace(gm, node, kind, x, inner)


def _replace(
    gm: fx.GraphModule, node: fx.Node, kind: type[nn.Module], x: fx.Node, inner: fx.Node
) -> None:
    with gm.graph.inserting_before(node):
        target = add_module(gm, f"{inner.target}_act", kind())
        new = gm.graph.call_module(target, (x,))
    facts.inherit(new, inner)
    facts.LAYER.put(new, facts.LAYER.get(inner, target))
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _gated(gm: fx.GraphModule, node: Any) -> tuple[type[nn.Module], fx.Node, fx.Node] | None:
    """``x * sigmoid(x)`` or ``x * hardsigmoid(x)``."""
    if node.target is not operator.mul or len(node.args) != 2:
        return None
    for x, gate in (node.args, node.args[::-1]):
        if is_call(gm, gate, nn.Sigmoid, nn.Hardsigmoid) and gate.args[0] is x:
            return nn.SiLU if is_call(gm, gate, nn.Sigmoid) else nn.Hardswish, x, gate
    return None


def _hard(gm: fx.GraphModule, node: Any) -> tuple[type[nn.Module], fx.Node, fx.Node] | None:
    """A sixth of ``relu6(x + 3)`` or of ``x * relu6(x + 3)``."""
    whole: Any = _sixth_of(node)
    if not isinstance(whole, fx.Node):
        return None
    x = _shifted(gm, whole)
    if x is not None:
        return nn.Hardsigmoid, x, whole
    if whole.target is operator.mul and len(whole.args) == 2:
        factors: Any = whole.args
        for factor, gate in (factors, factors[::-1]):
            x = _shifted(gm, gate)
            if x is not None and x is factor:
                return nn.Hardswish, x, gate
    return None


def _shifted(gm: fx.GraphModule, node: Any) -> fx.Node | None:
    """The x of ``relu6(x + 3)``."""
    if not is_call(gm, node, nn.ReLU6):
        return None
    added = node.args[0]
    if not isinstance(added, fx.Node) or added.target is not operator.add or len(added.args) != 2:
        return None
    for x, three in (added.args, added.args[::-1]):
        if isinstance(three, (int, float)) and three == 3 and isinstance(x, fx.Node):
            return x
    return None


def _sixth_of(node: fx.Node) -> Any:
    if len(node.args) != 2:
        return None
    a, b = node.args
    if node.target is operator.truediv and isinstance(b, (int, float)) and b == 6:
        return a
    if node.target is operator.mul:
        for x, factor in ((a, b), (b, a)):
            if isinstance(factor, float) and abs(factor * 6 - 1) < 1e-6:
                return x
    return None
