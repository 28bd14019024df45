"""Operators that are written in others for which there are int8 kernels, and constants computed in the graph.

    GLU(x)      a * sigmoid(b), a and b the halves of x
    SELU(x)     s * ELU(x)
    x ** 2      x * x
    weight.reshape(1, -1, 1, 1) * (variance + eps).rsqrt()          a constant

A square behind the last layer stays as it is: there it is arithmetic on outputs, in float.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import add_module
from rewriter.graph.lookup import is_call, module_of
from rewriter.tracing.fold_affine import feeding_layers

F = nn.functional

_POWERS = (operator.pow, torch.pow, "pow", "__pow__")
_SQUARES = (torch.square, "square")
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
# A constant may be this many times as large as what it is computed from, and a few numbers in any case.
GROWTH, SMALL = 4, 4096


def fold_constants(gm: fx.GraphModule) -> None:
    """What is computed from parameters and buffers alone becomes a buffer; edits gm in place."""
    values: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value: Any = operator.attrgetter(str(node.target))(gm)
            if isinstance(value, Tensor) and value.is_floating_point():
                values[node] = value.detach()
        elif node.op in ("call_function", "call_method") and _depends_on(node, values):
            found = _computed(node, values)
            if isinstance(found, Tensor) and found.is_floating_point():
                values[node] = found
    for node in list(gm.graph.nodes):
        if node.op == "get_attr" or node not in values:
            continue
        if all(user in values for user in node.users):
            continue  # a step on the way
        name = f"constant_{node.name}"
        gm.register_buffer(name, values[node].clone().contiguous())
        with gm.graph.inserting_before(node):
            new = gm.graph.get_attr(name)
        facts.inherit(new, node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in values)
    gm.graph.eliminate_dead_code()


def _depends_on(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    inputs = node.all_input_nodes
    return bool(inputs) and all(n in values for n in inputs)


def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)  # type: ignore[misc]
    with torch.no_grad():
        if node.op == "call_method":
            found = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            found = node.target(*args, **kwargs)  # type: ignore[operator]
    read = sum(values[n].numel() for n in node.all_input_nodes)
    small = isinstance(found, Tensor) and found.numel() <= max(GROWTH * read, SMALL)
    return found if small else None


def expand_operators(gm: fx.GraphModule) -> None:
    """Write operators in others; edits gm in place."""
    ahead = feeding_layers(gm)
    for node in list(gm.graph.nodes):
        if is_call(gm, node, nn.GLU):
            _glu(gm, node, module_of(gm, node).dim)
        elif node.target is F.glu:
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
            _glu(gm, node, dim)
        elif is_call(gm, node, nn.SELU) or node.target in (F.selu, torch.selu):
            _selu(gm, node)
        elif node in ahead and _is_square(node):
            node.op, node.target = "call_function", operator.mul
            node.args, node.kwargs = (node.args[0], node.args[0]), {}


def _is_square(node: fx.Node) -> bool:
    if (
        node.op not in ("call_function", "call_method")
        or facts.DTYPE.get(node) is not torch.float32
    ):
        return False
    if node.target in _SQUARES:
        return len(node.args) == 1
    return node.target in _POWERS and len(node.args) == 2 and node.args[1] in (2, 2.0)


def _activation(gm: fx.GraphModule, node: fx.Node, kind: nn.Module, x: fx.Node) -> fx.Node:
    place = str(node.target) if node.op == "call_module" else node.name
    target = add_module(gm, f"{place}_act", kind)
    new = gm.graph.call_module(target, (x,))
    facts.inherit(new, node)
    facts.LAYER.put(new, facts.LAYER.get(node, target))
    return new


def _glu(gm: fx.GraphModule, node: fx.Node, dim: int) -> None:
    (source,) = node.all_input_nodes
    shape = facts.SHAPE.get(source)
    if shape is None or facts.SHAPE.get(node) is None:
        return
    axis = dim % len(shape)
    half = shape[axis] // 2
    before = (slice(None),) * axis
    with gm.graph.inserting_before(node):
        parts = [
            gm.graph.call_function(operator.getitem, (source, (*before, part)))
            for part in (slice(0, half), slice(half, 2 * half))
        ]
        for part in parts:
            facts.inherit(part, node)
        gate = _activation(gm, node, nn.Sigmoid(), parts[1])
        new = gm.graph.call_function(operator.mul, (parts[0], gate))
    facts.inherit(new, node)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _selu(gm: fx.GraphModule, node: fx.Node) -> None:
    (source,) = node.all_input_nodes
    with gm.graph.inserting_before(node):
        inner = _activation(gm, node, nn.ELU(_SELU_ALPHA), source)
        new = gm.graph.call_function(operator.mul, (inner, _SELU_SCALE))
    facts.inherit(new, node)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
