"""Which values of a graph exist in int8 on a target, and which of them must share one range.

The quantization points are those of a fused int8 runtime: a convolution and the activation that
its kernel computes are one operation, so only the value behind the activation is quantized;
inputs of add, mul, cat and pooling are int8 values; an operation that only moves values
(reshape, max pool, nearest upsampling, slicing) keeps the scale of what it reads. A layer kept
in float reads floats, also where its neighbour reads the same value in int8. A node's annotation
is ``facts.INT8``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import is_call, module_of, outputs
from rewriter.graph.ops import ACTIVATION_TYPES, CLIP_TYPES, LAYER_TYPES, Operator, row_of, types
from rewriter.int8.scheme import QuantScheme, QuantSpec

_POOLS = types(lambda row: row.pools)
# Behind a layer whose value has 16 bits their own has 8: it spans [-1, 1] at most, and QNN fixes the
# scale of their 16-bit form.
_BOUNDED = types(lambda row: row.bounded)
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


@dataclass(frozen=True)
class Annotation:
    """What int8 does at one node.

    Args:
        weight: how this layer's weight is stored; None: it has none, or it stays in float.
        output: how the value this node makes is stored; None: no int8 form of it exists.
        reads: names of the argument nodes that this node reads in int8.
        range_of: name of the value that owns the range; the same for all that share it.
        inner: whether this activation takes two kernels, with an int8 value (its gate) between them.
        float_bias: whether the layer adds its bias in float.
    """

    weight: QuantSpec | None = None
    output: QuantSpec | None = None
    reads: tuple[str, ...] = ()
    range_of: str = ""
    inner: bool = False
    float_bias: bool = False


def annotation(node: fx.Node) -> Annotation:
    """What ``annotate`` wrote at a node."""
    return facts.INT8.of(node)


def annotate(gm: fx.GraphModule, scheme: QuantScheme) -> None:
    """Write an ``Annotation`` into ``facts.INT8`` of every node, in place.

    A node whose ``meta["keep_float"]`` is true stays in float. Where the target has 16-bit values,
    a layer whose ``meta["keep_int16"]`` is true writes one, and so does the activation behind it.
    """
    for node, note in notes_of(gm, scheme).items():
        facts.INT8.put(node, note)


def notes_of(gm: fx.GraphModule, scheme: QuantScheme) -> dict[fx.Node, Annotation]:
    """What ``annotate`` would write at each node."""
    found = _Reading(gm, scheme)
    reads = found.reads
    quantized = {value for values in reads.values() for value in values}
    fixed = {n: f for n in quantized if (f := found.fixed(n)) is not None}
    owner = _owners(gm, quantized, reads, scheme, fixed)
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
            inner=bool(node in quantized and reads[node])
            and found.is_int8_operation(node)
            and is_call(gm, node, *scheme.inner_values),
            float_bias=scheme.float_bias,
        )
        for node in gm.graph.nodes
    }


def moves_values(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node only selects or rearranges values (or pads with zero)."""
    row = row_of_node(gm, node)
    if row is None:
        return False
    if row.module is nn.Upsample:
        return module_of(gm, node).mode == "nearest"
    return row.moves


def row_of_node(gm: fx.GraphModule, node: fx.Node) -> Operator | None:
    """The row of the table of operators for what a node does; None: there is none."""
    if node.op == "call_module":
        return row_of(type(module_of(gm, node)))
    return row_of(node.target) if node.op in ("call_function", "call_method") else None


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


class _Reading:
    """Who reads which values in int8.

    Args:
        gm: canonical graph.
        scheme: the target.
    """

    def __init__(self, gm: fx.GraphModule, scheme: QuantScheme) -> None:
        self.gm, self.scheme = gm, scheme
        self.ahead = _before_layers(gm)
        self.fused = {n for n in gm.graph.nodes if self._is_fused(n)}
        self.reads: dict[fx.Node, set[fx.Node]] = {n: set() for n in gm.graph.nodes}
        for node in gm.graph.nodes:
            if node in self.fused or node.op in ("placeholder", "get_attr"):
                continue
            for value in node.all_input_nodes:
                if self._exists_in_int8(value, node):
                    self.reads[node].add(value)

    def _is_fused(self, node: fx.Node) -> bool:
        """An activation that the kernel of the operation before it computes."""
        if not is_call(self.gm, node, *self.scheme.fuses) or facts.KEEP_FLOAT.get(node):
            return False
        before = node.args[0]
        if not isinstance(before, fx.Node) or len(before.users) != 1:
            return False
        arithmetic = before.op == "call_function" and before.target in (operator.add, operator.mul)
        if arithmetic or is_layer(self.gm, before) or is_call(self.gm, before, nn.BatchNorm2d):
            return True
        # a clip behind a float operation needs no int8 value in between
        clips = is_call(self.gm, node, *CLIP_TYPES) and before.op != "placeholder"
        return (
            clips
            and _is_float_tensor(before)
            and not (moves_values(self.gm, before) or self.is_int8_operation(before))
        )

    def _exists_in_int8(self, value: fx.Node, reader: fx.Node) -> bool:
        """Whether ``reader`` reads ``value`` in int8."""
        if not _is_float_tensor(value) or any(user in self.fused for user in value.users):
            return False
        if self.scheme.int8_only and self._made_in_int8(value):
            return True  # no other form of it exists
        if moves_values(self.gm, value) and self.reads[value]:
            return True  # an int8 value that was moved: no other form of it exists
        if reader.op == "output":
            return self._made_in_int8(value)
        kept = bool(facts.KEEP_FLOAT.get(reader))
        if is_layer(self.gm, reader):
            return not kept
        if kept:
            asked = facts.READS_FLOAT.get(reader) and is_layer(self.gm, self._maker(value))
            return self._made_by_layer(value) if asked else self._made_in_int8(value)
        if moves_values(self.gm, reader):
            # moving a float is free: what decides is who reads it behind the move
            made = self._made_in_int8(value)
            return self._read_in_int8(reader) or (
                made and not _read_by_kept_layers(self.gm, reader)
            )
        return self.is_int8_operation(reader) or self._made_by_layer(value)

    def is_int8_operation(self, node: fx.Node) -> bool:
        """Whether a node that is no layer and moves nothing reads and writes int8."""
        if operation_of(self.gm, node) in self.scheme.computes:
            return not facts.KEEP_FLOAT.get(node)
        row = row_of_node(self.gm, node)
        if row is None or not row.int8 or row.layer or facts.KEEP_FLOAT.get(node):
            return False
        if moves_values(self.gm, node):
            return False
        tensors = [n for n in node.args if isinstance(n, fx.Node) and _is_float_tensor(n)]
        if row.tensors is None:
            return True
        if len(tensors) == row.tensors:  # a square may be part of a norm that is written out
            return len(set(tensors)) > 1 or self._links(node)
        # Behind the last layer, and next to float operations, numbers are arithmetic in float.
        return with_number(node) is not None and self._links(node)

    def fixed(self, node: fx.Node) -> tuple[float, int] | None:
        """Scale and zero point that the kernel of an int8 operation, or a plan, prescribes for its output."""
        limited = self.reads[node] and self.scheme.fixed_ranges and self.is_int8_operation(node)
        prescribed = self.scheme.fixed(operation_of(self.gm, node)) if limited else None
        return facts.GRID.get(node, prescribed)

    def _links(self, node: fx.Node) -> bool:
        """Whether all that read a value, directly or moved, are layers or int8 operations in front of one."""
        return node in self.ahead and all(
            (is_layer(self.gm, user) and not facts.KEEP_FLOAT.get(user))
            or (self.is_int8_operation(user) and user in self.ahead)
            or (moves_values(self.gm, user) and self._links(user))
            for user in node.users
        )

    def _read_in_int8(self, moved: fx.Node) -> bool:
        return any(
            (is_layer(self.gm, user) and not facts.KEEP_FLOAT.get(user))
            or self.is_int8_operation(user)
            or (moves_values(self.gm, user) and self._read_in_int8(user))
            for user in moved.users
        )

    def _made_in_int8(self, value: fx.Node) -> bool:
        """Whether the operation that makes ``value`` writes int8."""
        maker = self._maker(value)
        if facts.KEEP_FLOAT.get(maker):
            return False
        if is_layer(self.gm, maker):
            return True
        if moves_values(self.gm, maker):
            return bool(self.reads[maker])
        return self.is_int8_operation(maker)

    def _made_by_layer(self, value: fx.Node) -> bool:
        """Whether a layer makes ``value`` whose kernel cannot write floats: what reads it in float must read it in int8."""
        maker = self._maker(value)
        if not is_layer(self.gm, maker) or facts.KEEP_FLOAT.get(maker):
            return False
        row = row_of_node(self.gm, maker)
        return row is not None and self.scheme.name not in row.float_output

    def _maker(self, value: fx.Node) -> fx.Node:
        maker = value.args[0] if value in self.fused else value
        assert isinstance(maker, fx.Node)
        return maker


def operation_of(gm: fx.GraphModule, node: fx.Node) -> str:
    """What a scheme calls an operation; "" where none limits it."""
    kind: Any = type(module_of(gm, node)) if node.op == "call_module" else node.target
    return OPERATIONS.get(kind, "") if node.op in ("call_module", "call_function") else ""


def with_number(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The value and the number of a sum or product of the two; None for any other node."""
    if node.target not in (operator.add, operator.mul) or len(node.args) != 2 or node.kwargs:
        return None
    for value, number in (node.args, node.args[::-1]):
        plain = isinstance(number, (int, float)) and not isinstance(number, bool)
        if plain and isinstance(value, fx.Node) and _is_float_tensor(value):
            assert isinstance(number, (int, float))
            return value, float(number)
    return None


def _before_layers(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes from whose values a layer that is not kept in float still computes something."""
    found: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if any(
            user in found or (is_layer(gm, user) and not facts.KEEP_FLOAT.get(user))
            for user in node.users
        ):
            found.add(node)
    return found


def _is_float_tensor(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return False
    return facts.DTYPE.get(node) is torch.float32


def _read_by_kept_layers(gm: fx.GraphModule, moved: fx.Node) -> bool:
    """Whether only layers kept in float read ``moved``: it must then not be rounded."""
    return bool(moved.users) and all(
        (is_layer(gm, user) and bool(facts.KEEP_FLOAT.get(user)))
        or (moves_values(gm, user) and _read_by_kept_layers(gm, user))
        for user in moved.users
    )


def _weight_spec(gm: fx.GraphModule, node: fx.Node, scheme: QuantScheme) -> QuantSpec | None:
    if not is_layer(gm, node) or facts.KEEP_FLOAT.get(node):
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
        return bool(facts.KEEP_INT16.get(value)) and not facts.KEEP_FLOAT.get(value)
    if not is_call(gm, value, *ACTIVATION_TYPES) or is_call(gm, value, *_BOUNDED):
        return False
    (source,) = value.all_input_nodes
    return len(source.users) == 1 and is_layer(gm, source) and _is_wide(gm, source)


def _owners(
    gm: fx.GraphModule,
    quantized: set[fx.Node],
    reads: dict[fx.Node, set[fx.Node]],
    scheme: QuantScheme,
    fixed: Mapping[fx.Node, tuple[float, int]],
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
    if shared and not facts.KEEP_FLOAT.get(node):
        yield from node.all_input_nodes


def is_mean(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a pool averages all places, which kernels of a mean do with two ranges."""
    pool, (source,) = module_of(gm, node), node.all_input_nodes
    if tuple(facts.SHAPE.of(node)[-2:]) != (1, 1):
        return False
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        return True
    size, kernel, padding = facts.SHAPE.of(source)[-2:], pool.kernel_size, pool.padding
    kernel = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
    padded = padding not in (0, (0, 0)) or pool.divisor_override is not None
    return not padded and kernel == tuple(size)


def quantized_outputs(gm: fx.GraphModule) -> list[fx.Node]:
    """The values that the graph returns in int8."""
    (output,) = gm.graph.find_nodes(op="output")
    return [n for n in outputs(gm) if n.name in annotation(output).reads]
