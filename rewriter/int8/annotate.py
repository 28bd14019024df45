"""Which values of a graph exist in int8 on a target, and which of them must share one range.

The quantization points are those of a fused int8 runtime: a convolution and the activation that
its kernel computes are one operation, so only the value behind the activation is quantized;
inputs of add, mul, cat and pooling are int8 values; an operation that only moves values
(reshape, max pool, nearest upsampling, slicing) keeps the scale of what it reads. A layer kept
in float reads floats, also where its neighbour reads the same value in int8.

A node's annotation is ``node.meta["int8"]``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from rewriter.graph.lookup import is_call, module_of, outputs
from rewriter.graph.ops import ACTIVATION_TYPES, LAYER_TYPES
from rewriter.int8.scheme import QuantScheme, QuantSpec

_INT8_FUNCTIONS = (operator.add, operator.mul, torch.cat, torch.mean)
_INT8_MODULES = (
    # no integer kernel computes a softplus
    *(kind for kind in ACTIVATION_TYPES if kind is not nn.Softplus),
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)
_MOVING_MODULES = (
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d,
    nn.PixelShuffle,
    nn.ChannelShuffle,
)
_MOVING_METHODS = (
    "reshape",
    "permute",
    "transpose",
    "chunk",
    "split",
    "squeeze",
    "unsqueeze",
    "expand",
)
_MOVING_FUNCTIONS = (
    torch.flatten,
    operator.getitem,
    torch.chunk,
    torch.split,
    torch.squeeze,
    torch.unsqueeze,
)
_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
# Operations that a target's kernels may limit, by the name that its scheme calls them.
OPERATIONS: dict[Any, str] = {
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Tanh: "tanh",
    nn.Softmax: "softmax",
    torch.softmax: "softmax",
    torch.nn.functional.softmax: "softmax",
    torch.nn.functional.normalize: "l2_norm",
}
# Behind a layer whose value has 16 bits their own has 8: it spans [-1, 1] at most, and QNN fixes the
# scale of their 16-bit form.
_BOUNDED = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid)


@dataclass(frozen=True)
class Annotation:
    """What int8 does at one node.

    Args:
        weight: how this layer's weight is stored; None: it has none, or it stays in float.
        output: how the value this node makes is stored; None: no int8 form of it exists.
        reads: names of the argument nodes that this node reads in int8.
        range_of: name of the value that owns the range; the same for all that share it.
        inner: scale and zero point of the int8 value inside an activation of two kernels; None: it has none.
        float_bias: whether the layer adds its bias in float.
    """

    weight: QuantSpec | None = None
    output: QuantSpec | None = None
    reads: tuple[str, ...] = ()
    range_of: str = ""
    inner: tuple[float, int] | None = None
    float_bias: bool = False


def annotation(node: fx.Node) -> Annotation:
    """What ``annotate`` wrote at a node."""
    return node.meta["int8"]


def annotate(gm: fx.GraphModule, scheme: QuantScheme) -> None:
    """Write an ``Annotation`` into ``node.meta["int8"]`` of every node, in place.

    A node whose ``meta["keep_float"]`` is true stays in float. Where the target has 16-bit values,
    a layer whose ``meta["keep_int16"]`` is true writes one, and so does the activation behind it.
    """
    for node, note in notes_of(gm, scheme).items():
        node.meta["int8"] = note


def notes_of(gm: fx.GraphModule, scheme: QuantScheme) -> dict[fx.Node, Annotation]:
    """What ``annotate`` would write at each node."""
    fused = {n for n in gm.graph.nodes if _is_fused(gm, n, scheme)}
    reads: dict[fx.Node, set[fx.Node]] = {n: set() for n in gm.graph.nodes}
    for node in gm.graph.nodes:
        if node in fused or node.op in ("placeholder", "get_attr"):
            continue
        for value in node.all_input_nodes:
            if _exists_in_int8(gm, value, node, fused, reads, scheme):
                reads[node].add(value)
    quantized = {value for found in reads.values() for value in found}
    fixed = {n: _fixed(gm, n, scheme) for n in quantized if reads[n]}
    owner = _owners(gm, quantized, reads, scheme, {n: f for n, f in fixed.items() if f})
    # all that share a range are stored alike
    wide = {owner[n] for n in quantized if _is_wide(gm, n)} if scheme.wide is not None else set()
    return {
        node: Annotation(
            weight=_weight_spec(gm, node, scheme),
            output=_output_spec(scheme, owner[node] in wide, fixed.get(owner[node]))
            if node in quantized
            else None,
            reads=tuple(n.name for n in node.all_input_nodes if n in reads[node]),
            range_of=owner[node].name if node in quantized else "",
            inner=scheme.fixed("sigmoid")
            if reads[node] and is_call(gm, node, *scheme.inner_values)
            else None,
            float_bias=scheme.float_bias,
        )
        for node in gm.graph.nodes
    }


def moves_values(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node only selects or rearranges values (or pads with zero)."""
    if node.op == "call_module":
        m = module_of(gm, node)
        return type(m) in _MOVING_MODULES or (type(m) is nn.Upsample and m.mode == "nearest")
    if node.op == "call_method":
        return node.target in _MOVING_METHODS
    return node.op == "call_function" and node.target in _MOVING_FUNCTIONS


def is_layer(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a weighted layer that runs in int8 unless it is kept in float."""
    return is_call(gm, node, *LAYER_TYPES)


def is_decoding(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a layer is arithmetic behind a head: the expectation of a softmax over bins.

    Detectors with distributions for the sides of a box (Li et al., 2020, arXiv:2006.04388) write
    it as a convolution with the fixed weights 0, 1, 2, ... and one output channel.
    """
    if not is_layer(gm, node) or module_of(gm, node).weight.shape[0] != 1:
        return False
    source = node.args[0]
    while isinstance(source, fx.Node) and moves_values(gm, source):
        source = source.args[0]
    return is_call(gm, source, nn.Softmax)


def _is_fused(gm: fx.GraphModule, node: fx.Node, scheme: QuantScheme) -> bool:
    """An activation that the kernel of the operation before it computes."""
    if not is_call(gm, node, *scheme.fuses) or node.meta.get("keep_float"):
        return False
    before = node.args[0]
    if not isinstance(before, fx.Node) or len(before.users) != 1:
        return False
    arithmetic = before.op == "call_function" and before.target in (operator.add, operator.mul)
    return arithmetic or is_layer(gm, before) or is_call(gm, before, nn.BatchNorm2d)


def _exists_in_int8(
    gm: fx.GraphModule,
    value: fx.Node,
    reader: fx.Node,
    fused: set[fx.Node],
    reads: dict[fx.Node, set[fx.Node]],
    scheme: QuantScheme,
) -> bool:
    """Whether ``reader`` reads ``value`` in int8."""
    if not _is_float_tensor(value) or any(user in fused for user in value.users):
        return False
    if scheme.int8_only and _made_in_int8(gm, value, fused, reads, scheme):
        return True  # no other form of it exists
    if moves_values(gm, value) and reads[value]:
        return True  # an int8 value that was moved: no other form of it exists
    if reader.op == "output":
        return _made_in_int8(gm, value, fused, reads, scheme)
    kept = bool(reader.meta.get("keep_float"))
    if is_layer(gm, reader):
        return not kept
    if kept:
        return _made_in_int8(gm, value, fused, reads, scheme)
    if moves_values(gm, reader):
        # moving a float is free: what decides is who reads it behind the move
        made = _made_in_int8(gm, value, fused, reads, scheme)
        return _read_in_int8(gm, reader, scheme) or (made and not _read_by_kept_layers(gm, reader))
    return _is_int8_operation(gm, reader, scheme)


def _is_float_tensor(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return False
    return node.meta.get("dtype") is torch.float32


def operation_of(gm: fx.GraphModule, node: fx.Node) -> str:
    """What a scheme calls an operation; "" where none limits it."""
    kind: Any = type(module_of(gm, node)) if node.op == "call_module" else node.target
    return OPERATIONS.get(kind, "") if node.op in ("call_module", "call_function") else ""


def _fixed(gm: fx.GraphModule, node: fx.Node, scheme: QuantScheme) -> tuple[float, int] | None:
    """Scale and zero point that the kernel of an int8 operation prescribes for its output."""
    if not scheme.fixed_ranges or not _is_int8_operation(gm, node, scheme):
        return None
    return scheme.fixed(operation_of(gm, node))


def _is_int8_operation(gm: fx.GraphModule, node: fx.Node, scheme: QuantScheme) -> bool:
    if node.meta.get("keep_float"):
        return False
    if operation_of(gm, node) in scheme.computes:
        return True
    if node.op == "call_module":
        m = module_of(gm, node)
        return type(m) in _INT8_MODULES or (type(m) is nn.Upsample and m.mode != "nearest")
    if node.op == "call_function" and node.target in _INT8_FUNCTIONS:
        # a product with a constant or a scalar has no int8 kernel of its own; it stays in float
        tensors = [n for n in node.all_input_nodes if _is_float_tensor(n)]
        return node.target in (torch.cat, torch.mean) or len(tensors) == 2
    return False


def _read_in_int8(gm: fx.GraphModule, moved: fx.Node, scheme: QuantScheme) -> bool:
    return any(
        (is_layer(gm, user) and not user.meta.get("keep_float"))
        or _is_int8_operation(gm, user, scheme)
        or (moves_values(gm, user) and _read_in_int8(gm, user, scheme))
        for user in moved.users
    )


def _read_by_kept_layers(gm: fx.GraphModule, moved: fx.Node) -> bool:
    """Whether only layers kept in float read ``moved``: it must then not be rounded."""
    return bool(moved.users) and all(
        (is_layer(gm, user) and bool(user.meta.get("keep_float")))
        or (moves_values(gm, user) and _read_by_kept_layers(gm, user))
        for user in moved.users
    )


def _made_in_int8(
    gm: fx.GraphModule,
    value: fx.Node,
    fused: set[fx.Node],
    reads: dict[fx.Node, set[fx.Node]],
    scheme: QuantScheme,
) -> bool:
    """Whether the operation that makes ``value`` writes int8."""
    maker = value.args[0] if value in fused else value
    assert isinstance(maker, fx.Node)
    if maker.meta.get("keep_float"):
        return False
    if is_layer(gm, maker):
        return True
    if moves_values(gm, maker):
        return bool(reads[maker])
    return _is_int8_operation(gm, maker, scheme)


def _weight_spec(gm: fx.GraphModule, node: fx.Node, scheme: QuantScheme) -> QuantSpec | None:
    if not is_layer(gm, node) or node.meta.get("keep_float"):
        return None
    return scheme.linear_weights if is_call(gm, node, nn.Linear) else scheme.weights


def _output_spec(
    scheme: QuantScheme, wide: bool, fixed: tuple[float, int] | None = None
) -> QuantSpec:
    if wide and scheme.wide is not None:
        return scheme.wide
    return scheme.activations if fixed is None else replace(scheme.activations, fixed=fixed)


def _is_wide(gm: fx.GraphModule, value: fx.Node) -> bool:
    """Whether a value is made by a layer that is to write 16 bits, or by the activation that alone reads such a layer."""
    if is_layer(gm, value):
        return bool(value.meta.get("keep_int16")) and not value.meta.get("keep_float")
    if not is_call(gm, value, *ACTIVATION_TYPES) or is_call(gm, value, *_BOUNDED):
        return False
    (source,) = value.all_input_nodes
    return len(source.users) == 1 and is_layer(gm, source) and _is_wide(gm, source)


def _owners(
    gm: fx.GraphModule,
    quantized: set[fx.Node],
    reads: dict[fx.Node, set[fx.Node]],
    scheme: QuantScheme,
    fixed: dict[fx.Node, tuple[float, int]],
) -> dict[fx.Node, fx.Node]:
    """Union-find over the values that must have one range; the first in graph order owns it.

    A value whose range its own kernel fixes is requantized where it is joined with others than its like.
    """
    parent = {n: n for n in gm.graph.nodes}
    order = {n: i for i, n in enumerate(gm.graph.nodes)}

    def root(n: fx.Node) -> fx.Node:
        while parent[n] is not n:
            n = parent[n]
        return n

    for node in gm.graph.nodes:
        for value in _same_range(gm, node, scheme):
            if value in reads[node] and (node in quantized or node.op == "output"):
                if node.target is torch.cat and root(value) in fixed:
                    like = {fixed.get(root(v)) for v in node.all_input_nodes}
                    if len(like) > 1:
                        continue
                a, b = sorted((root(node), root(value)), key=order.__getitem__)
                parent[b] = a
    return {n: root(n) for n in gm.graph.nodes}


def _same_range(gm: fx.GraphModule, node: fx.Node, scheme: QuantScheme) -> Iterator[Any]:
    if node.op == "output":
        return
    if moves_values(gm, node):  # also where it is left in float: an int8 value stays one
        yield from node.all_input_nodes
        return
    shared = (
        ("cat" in scheme.shared_at and node.target is torch.cat)
        or ("add" in scheme.shared_at and node.target is operator.add)
        or ("pool" in scheme.shared_at and is_call(gm, node, *_POOLS) and not is_mean(gm, node))
        # one that only repeats values moves them
        or ("resize" in scheme.shared_at and is_call(gm, node, nn.Upsample))
    )
    if shared and not node.meta.get("keep_float"):
        yield from node.all_input_nodes


def is_mean(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a pool averages all places, which kernels of a mean do with two ranges."""
    pool, (source,) = module_of(gm, node), node.all_input_nodes
    if tuple(node.meta["shape"][-2:]) != (1, 1):
        return False
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        return True
    size, kernel, padding = source.meta["shape"][-2:], pool.kernel_size, pool.padding
    kernel = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
    padded = padding not in (0, (0, 0)) or pool.divisor_override is not None
    return not padded and kernel == tuple(size)


def quantized_outputs(gm: fx.GraphModule) -> list[fx.Node]:
    """The values that the graph returns in int8."""
    (output,) = gm.graph.find_nodes(op="output")
    return [n for n in outputs(gm) if n.name in annotation(output).reads]
