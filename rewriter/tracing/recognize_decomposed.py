"""Activations and normalizations that were written out, or that an exporter took apart, recognized by what they compute.

0.5 x (1 + erf(x / sqrt 2))                                     GELU
0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))               GELU, its approximation
x tanh(softplus(x))                                             Mish
(x - mean x) / sqrt(mean (x - mean x)^2 + eps), times a weight, plus a bias, over the last axes: LayerNorm
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import add_module
from rewriter.graph.lookup import is_call

_POWERS = (torch.pow, operator.pow, "pow")
_MULTIPLY = (operator.mul, torch.mul)
_NEAR = 1e-3


def recognize_decomposed(gm: fx.GraphModule) -> None:
    """Put one module in the place of each expression of the list above; edits gm in place."""
    for node in list(gm.graph.nodes):
        if node.target in _MULTIPLY:
            _activation(gm, node)
    for node in list(gm.graph.nodes):
        if node.target in (operator.truediv, torch.div, *_MULTIPLY):
            _layer_norm(gm, node)
    gm.graph.eliminate_dead_code()


def _call(node: Any, *targets: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op in ("call_function", "call_method")
        and node.target in targets
    )


def _number(gm: fx.GraphModule, value: Any) -> float | None:
    """The plain number that an argument is, also as a tensor of one element."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, fx.Node) and value.op == "get_attr":
        tensor = operator.attrgetter(str(value.target))(gm)
        if isinstance(tensor, Tensor) and tensor.numel() == 1:
            return float(tensor)
    return None


def _product(gm: fx.GraphModule, node: Any, *, inner: bool = False) -> tuple[float, list[fx.Node]]:
    """A tree of multiplications and divisions by numbers as one number and the other factors.

    A factor that others read too is not taken apart: what an activation reads may be a product itself.
    """
    whole = inner and isinstance(node, fx.Node) and len(node.users) > 1
    if not whole and _call(node, *_MULTIPLY, operator.truediv, torch.div) and len(node.args) == 2:
        left, right = node.args
        a, b = _number(gm, left), _number(gm, right)
        if node.target in _MULTIPLY:
            scales, factors = 1.0, list[fx.Node]()
            for argument, value in ((left, a), (right, b)):
                more, found = (
                    (value, []) if value is not None else _product(gm, argument, inner=True)
                )
                scales, factors = scales * more, factors + found
            return scales, factors
        if b:
            scale, factors = _product(gm, left, inner=True)
            return scale / b, factors
    return 1.0, [node]


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _NEAR * abs(b)


def _sum(gm: fx.GraphModule, node: Any) -> tuple[float, Any] | None:
    """The number and the other summand of ``value + number``."""
    if not _call(node, operator.add, torch.add) or len(node.args) != 2:
        return None
    for value, other in (node.args, node.args[::-1]):
        number = _number(gm, other)
        if number is not None and isinstance(value, fx.Node):
            return number, value
    return None


def _activation(gm: fx.GraphModule, node: fx.Node) -> None:
    scale, factors = _product(gm, node)
    if len(factors) != 2:
        return None
    for x, gate in (factors, factors[::-1]):
        if (
            _close(scale, 1.0)
            and is_call(gm, gate, nn.Tanh)
            and is_call(gm, gate.args[0], nn.Softplus)
        ):
            inner: Any = gate.args[0]
            if inner.args[0] is x:
                return _replace(gm, node, nn.Mish(), x)
        one = _sum(gm, gate)
        if one is None or not _close(one[0], 1.0) or not _close(scale, 0.5):
            continue
        if _call(one[1], torch.erf, torch.special.erf, "erf"):
            inside, names = _product(gm, one[1].args[0])
            if names == [x] and _close(inside, 1 / math.sqrt(2)):
                return _replace(gm, node, nn.GELU(), x)
        if is_call(gm, one[1], nn.Tanh) and _is_cubic(gm, one[1].args[0], x):
            return _replace(gm, node, nn.GELU("tanh"), x)
    return None


def _is_cubic(gm: fx.GraphModule, node: Any, x: fx.Node) -> bool:
    """Whether ``node`` is sqrt(2 / pi) (x + 0.044715 x^3)."""
    scale, factors = _product(gm, node)
    if len(factors) != 1 or not _close(scale, math.sqrt(2 / math.pi)):
        return False
    inner: Any = factors[0]
    if not _call(inner, operator.add, torch.add) or len(inner.args) != 2:
        return False
    for first, second in (inner.args, inner.args[::-1]):
        if first is not x:
            continue
        third, powers = _product(gm, second)
        cubes = len(powers) == 3 and all(p is x for p in powers)
        if len(powers) == 1 and _call(powers[0], *_POWERS):
            cubes = powers[0].args[0] is x and _number(gm, powers[0].args[1]) == 3
        if cubes and _close(third, 0.044715):
            return True
    return False


def _layer_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    found = _normalized(gm, node)
    if found is None:
        return
    x, sizes, eps = found
    layer = nn.LayerNorm(sizes, eps)
    end = node
    for name, targets in (("weight", _MULTIPLY), ("bias", (operator.add, torch.add))):
        constant = _only_reader_with_constant(gm, end, targets, sizes)
        if constant is not None:
            end, tensor = constant
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    for p in layer.parameters():
        p.requires_grad_(False)
    _replace(gm, end, layer, x)


def _normalized(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, list[int], float] | None:
    """Input, normalized sizes and epsilon of ``(x - mean x) / sqrt(mean (x - mean x)^2 + eps)``."""
    if len(node.args) != 2:
        return None
    dividing = node.target in (operator.truediv, torch.div)
    pairs: Any = (node.args, node.args[::-1])
    for centered, root in pairs[: 1 if dividing else 2]:
        if not _call(centered, operator.sub, torch.sub):
            continue
        inner = _under_root(gm, root, inverse=not dividing)
        plus = None if inner is None else _sum(gm, inner)
        if plus is None or not _call(plus[1], torch.mean):
            continue
        x, mean = centered.args
        square: Any = plus[1].args[0]
        squared = (
            _call(square, *_POWERS)
            and _number(gm, square.args[1]) == 2
            and square.args[0] is centered
        )
        squared = squared or (_call(square, *_MULTIPLY) and set(square.args) == {centered})
        if not squared or not _call(mean, torch.mean) or mean.args[0] is not x:
            continue
        shape = _shape(gm, x)
        axes = _axes(mean, len(shape)), _axes(plus[1], len(shape))
        if axes[0] is None or axes[0] != axes[1]:
            continue
        if sorted(axes[0]) == list(range(len(shape) - len(axes[0]), len(shape))):
            return x, [shape[a] for a in sorted(axes[0])], plus[0]
    return None


def _under_root(gm: fx.GraphModule, node: Any, *, inverse: bool) -> Any:
    if inverse:
        if _call(node, torch.rsqrt, "rsqrt"):
            return node.args[0]
        if _call(node, torch.reciprocal, "reciprocal"):
            return _under_root(gm, node.args[0], inverse=False)
        if _call(node, operator.truediv, torch.div) and _number(gm, node.args[0]) == 1:
            return _under_root(gm, node.args[1], inverse=False)
        return None
    if _call(node, torch.sqrt, "sqrt"):
        return node.args[0]
    if _call(node, *_POWERS) and _number(gm, node.args[1]) == 0.5:
        return node.args[0]
    return None


def _axes(mean: fx.Node, rank: int) -> list[int] | None:
    """The axes of a mean that keeps its dimensions."""
    axes: Any = mean.args[1] if len(mean.args) > 1 else mean.kwargs.get("dim")
    keeps = mean.args[2] if len(mean.args) > 2 else mean.kwargs.get("keepdim")
    if axes is None or not keeps:
        return None
    return sorted(a % rank for a in (axes if isinstance(axes, (list, tuple)) else [axes]))


def _shape(gm: fx.GraphModule, node: fx.Node) -> tuple[int, ...]:
    return tuple(facts.SHAPE.get(node) or ())


def _only_reader_with_constant(
    gm: fx.GraphModule, node: fx.Node, targets: tuple[Callable[..., Any], ...], sizes: list[int]
) -> tuple[fx.Node, Tensor] | None:
    """The only reader of a value, if it combines it with a constant of the normalized sizes."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if not _call(user, *targets) or len(user.args) != 2:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, fx.Node) or other.op != "get_attr":
        return None
    tensor = operator.attrgetter(str(other.target))(gm)
    if not isinstance(tensor, Tensor) or tuple(tensor.shape[-len(sizes) :]) != tuple(sizes):
        return None
    if tensor.numel() != math.prod(sizes):
        return None
    return user, tensor.detach().reshape(sizes).clone()


def _replace(gm: fx.GraphModule, node: fx.Node, module: nn.Module, x: fx.Node) -> None:
    with gm.graph.inserting_before(node):
        target = add_module(gm, f"{node.name}_{type(module).__name__.lower()}", module)
        new = gm.graph.call_module(target, (x,))
    facts.inherit(new, node)
    facts.LAYER.put(new, facts.LAYER.get(node, target))
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
