"""Activations that the user wrote out by hand, recognised by what they compute.

g * clamp(a x + b, low, high) + d  from 0 to 1      Hardsigmoid of 6 g a x + 6 (g b + d) - 3
    relu6(x + 3) / 6, clamp(x + 3, 0, 6) * (1 / 6)  of x
    clamp(0.2 x + 0.5, 0, 1), relu6(1.2 x + 3) / 6  of 1.2 x
x * hardsigmoid(x), x * relu6(x + 3) / 6            Hardswish
x * sigmoid(x)                                      SiLU
"""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import add_module
from rewriter.graph.lookup import is_call, module_of
from rewriter.graph.ops import clip_bounds
from rewriter.tracing.fold_affine import affine_of

# Of the numbers that a user writes for thirds and sixths.
CLOSE = 1e-5
_Map = tuple[float, float]  # a and b of a x + b


def recognise_activations(gm: fx.GraphModule) -> None:
    """Put one module in the place of each activation written by hand; edits gm in place."""
    for node in list(gm.graph.nodes):
        if not node.users:
            continue  # part of one that was recognised
        _hard_sigmoid(gm, node)
    for node in list(gm.graph.nodes):
        found = _hard_swish(gm, node) or _gated(gm, node)
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


def _hard_sigmoid(gm: fx.GraphModule, clip: fx.Node) -> None:
    """Replace a clip between two affine maps, if they lead from 0 to 1; edits gm."""
    bounds = clip_bounds(module_of(gm, clip)) if clip.op == "call_module" else None
    if bounds is None or not all(math.isfinite(b) for b in bounds):
        return
    after = _to_unit(gm, clip, bounds)
    if after is None:
        return
    last, (g, d) = after
    inputs = [
        (x, (6 * g * a, 6 * (g * b + d) - 3)) for x, (a, b) in _maps_before(gm, clip.args[0])
    ]
    if not inputs:
        return  # a clip alone: the kernel before it computes it
    plain = [x for x, (a, b) in inputs if abs(a - 1) < CLOSE and abs(b) < CLOSE]
    x, (a, b) = (plain[0], (1.0, 0.0)) if plain else inputs[-1]
    with gm.graph.inserting_before(last):
        for function, number, nothing in ((operator.mul, a, 1.0), (operator.add, b, 0.0)):
            if abs(number - nothing) >= CLOSE:
                x = gm.graph.call_function(function, (x, number))
                facts.inherit(x, clip)
    _replace(gm, last, nn.Hardsigmoid, x, clip)


def _to_unit(gm: fx.GraphModule, clip: fx.Node, bounds: _Map) -> tuple[fx.Node, _Map] | None:
    """The affine map that the clip's readers apply until the values span [0, 1], and the last of them."""
    node, (g, d) = clip, (1.0, 0.0)
    while True:
        if abs(g * bounds[0] + d) < CLOSE and abs(g * bounds[1] + d - 1) < CLOSE:
            return node, (g, d)
        if len(node.users) != 1:
            return None
        (user,) = node.users
        following = _numbers(gm, user)
        if following is None:
            return None
        g, d = following[0] * g, following[0] * d + following[1]
        node = user


def _maps_before(gm: fx.GraphModule, node: Any) -> list[tuple[fx.Node, _Map]]:
    """Values of which ``node`` is an affine map, the nearest first."""
    found: list[tuple[fx.Node, _Map]] = []
    a, b = 1.0, 0.0
    while True:
        inner = _numbers(gm, node)
        if inner is None:
            return found
        a, b = a * inner[0], a * inner[1] + b
        node = affine_source(gm, node)
        found.append((node, (a, b)))


def affine_source(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The value that an affine map reads."""
    affine = affine_of(gm, node)
    assert affine is not None
    return affine.source


def _numbers(gm: fx.GraphModule, node: Any) -> _Map | None:
    """A and b where ``node`` is an affine map of one value by two numbers."""
    affine = affine_of(gm, node)
    if affine is None or affine.axis is not None:
        return None
    return float(affine.scale), float(affine.shift)


def _hard_swish(gm: fx.GraphModule, node: Any) -> tuple[type[nn.Module], fx.Node, fx.Node] | None:
    """A sixth of ``x * relu6(x + 3)``."""
    sixth = _numbers(gm, node)
    if sixth is None or abs(6 * sixth[0] - 1) >= CLOSE or abs(sixth[1]) >= CLOSE:
        return None
    whole = affine_source(gm, node)
    if whole.target is not operator.mul or len(whole.args) != 2 or len(whole.users) != 1:
        return None
    factors: Any = whole.args
    for factor, gate in (factors, factors[::-1]):
        if not is_call(gm, gate, nn.ReLU6):
            continue
        for x, (a, b) in _maps_before(gm, gate.args[0]):
            if x is factor and abs(a - 1) < CLOSE and abs(b - 3) < CLOSE:
                return nn.Hardswish, x, gate
    return None
