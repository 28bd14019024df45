"""Run many quantized variants of one network while the part they have in common is computed once.

A variant says, node by node, what is int8. The graph is walked once in the base configuration;
where a variant first differs, a fork runs the rest of the graph, and of that only the nodes that
depend on the difference. Only values that are still to be read are kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from rewriter.graph import facts
from rewriter.graph.interpret import device_of, last_uses, run_node
from rewriter.graph.lookup import is_call, module_of, outputs
from rewriter.graph.ops import CLIP_TYPES, clip_bounds
from rewriter.int8 import integer_grid
from rewriter.int8.annotate import annotate, annotation, is_layer, moves_values
from rewriter.int8.integer_grid import dequantized_weight, round_to_int8
from rewriter.int8.scheme import QuantScheme, QuantSpec, channel_axis
from rewriter.int8.simulate import Quantized
from rewriter.sensitivity.error_terms import Parts

# glibc hands larger blocks back to the kernel at once, and each use then starts with page faults.
LARGEST_BLOCK = 24 << 20


@dataclass(frozen=True)
class State:
    """What is int8 at one node: its weight, the arguments (by name) that it reads rounded, and the gate inside an activation."""

    weight: bool = False
    reads: frozenset[str] = frozenset()
    gate: bool = False


FLOAT = State()
# What is int8, by node name; a node that is not named is float.
Variant = Mapping[str, State]


def only(parts: Parts, layer: fx.Node) -> dict[str, State]:
    """One layer in int8, all else in float.

    That is its weight, the values it reads, and its result where no other int8 operation reads it.
    """
    note = annotation(layer)
    variant = {layer.name: State(note.weight is not None, frozenset(note.reads))}
    for reader, value in parts.returned[layer.name]:
        known = variant.get(reader, FLOAT)
        variant[reader] = replace(known, reads=known.reads | {value})
    return variant


def int8_variant(gm: fx.GraphModule) -> dict[str, State]:
    """The whole network in int8, as it is annotated."""
    found: dict[str, State] = {}
    for node in gm.graph.nodes:
        note = annotation(node)
        if note.weight is not None or note.reads:
            inner = note.inner and note.output is not None
            found[node.name] = State(note.weight is not None, frozenset(note.reads), inner)
    return found


def keeping(
    gm: fx.GraphModule, scheme: QuantScheme, layers: Sequence[fx.Node]
) -> dict[str, State]:
    """The whole network in int8 but for ``layers``, kept as the rule keep_float keeps them."""
    nodes = list(gm.graph.nodes)
    notes = [facts.INT8.of(n) for n in nodes]
    kept = [n for n in layers if not facts.KEEP_FLOAT.get(n)]
    try:
        for node in kept:
            facts.KEEP_FLOAT.put(node, True)
        annotate(gm, scheme)
        return int8_variant(gm)
    finally:
        for node in kept:
            facts.KEEP_FLOAT.drop(node)
        for node, note in zip(nodes, notes, strict=True):
            facts.INT8.put(node, note)


def value_params(quantized: Quantized, value: fx.Node) -> tuple[float, int, QuantSpec]:
    """Scale, zero point and form of the int8 value that ``value`` makes."""
    spec = annotation(value).output
    assert spec is not None, value.name
    return (*quantized.value_params(value), spec)


def rounded_weight(quantized: Quantized, node: fx.Node) -> Tensor:
    """The weight of a layer as its int8 kernel sees it."""
    layer, spec = module_of(quantized.gm, node), annotation(node).weight
    assert spec is not None, node.name
    weight: Any = layer.weight
    scale = quantized.calibration.weights[node.name].to(weight.device)
    return dequantized_weight(weight.detach(), scale, spec, channel_axis(layer, spec))


def rounded_bias(quantized: Quantized, node: fx.Node, input_scale: float) -> Tensor | None:
    """The bias of a layer as int32 holds it, in steps of input scale x weight scale."""
    layer: Any = module_of(quantized.gm, node)
    if layer.bias is None:
        return None
    bias: Tensor = layer.bias.detach()
    step = input_scale * quantized.calibration.weights[node.name].to(bias.device)
    return integer_grid.rounded_bias(bias, step)


def with_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A view of ``layer`` with another weight and bias; shares everything else."""
    twin = copy.copy(layer)
    # a shallow copy shares the dictionary of parameters with the original: give it one of its own
    own = {"weight": nn.Parameter(weight, requires_grad=False), "bias": bias}
    twin.__dict__["_parameters"] = {**layer.__dict__["_parameters"], **own}
    return twin


def modules_of(gm: fx.GraphModule) -> dict[fx.Node, nn.Module]:
    """The module of each ``call_module`` node; looking it up takes as long as a small kernel."""
    return {n: module_of(gm, n) for n in gm.graph.nodes if n.op == "call_module"}


def compute(
    gm: fx.GraphModule,
    modules: Mapping[fx.Node, nn.Module],
    node: fx.Node,
    values: dict[fx.Node, Any],
    feed: Iterator[Tensor] | None = None,
) -> Any:
    """The value of one node, as ``run_node`` gives it."""
    if node.op != "call_module":
        return run_node(gm, node, values, iter(()) if feed is None else feed)
    if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
        return modules[node](values[node.args[0]])
    args: Any = fx.map_arg(node.args, values.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, values.__getitem__)
    return modules[node](*args, **kwargs)


class Forks:
    """Evaluates variants of one quantized graph.

    Args:
        quantized: annotated and calibrated graph; it is not changed.
    """

    def __init__(self, quantized: Quantized) -> None:
        self.quantized, self.gm = quantized, quantized.gm
        (self.output,) = self.gm.graph.find_nodes(op="output")
        self.nodes = [n for n in self.gm.graph.nodes if n.op != "output"]
        self.returned = outputs(self.gm)
        uses = last_uses(self.gm)
        self.dying = [uses.get(n, []) for n in self.nodes]
        self.in_place = {n for n in self.nodes if may_overwrite(self.gm, n)}
        self.modules = modules_of(self.gm)
        moved = {n.name for n in self.nodes if moves_values(self.gm, n)}
        self.moved = moved
        self.params: dict[fx.Node, tuple[float, int, QuantSpec]] = {}
        self.gates: dict[fx.Node, nn.Module] = {}
        self.device = device_of(self.gm)

    def share(self, base: Variant, variant: Variant) -> float:
        """Share of the network's multiply-accumulates that a fork to ``variant`` runs."""
        from rewriter.graph.cost import layer_macs

        macs = layer_macs(self.gm)
        dirty = self._dependent(base, variant)
        return sum(macs.get(n.name, 0) for n in dirty) / max(sum(macs.values()), 1)

    def output_bytes(self, samples: int) -> int:
        """Size of what one variant returns for a batch."""
        shapes = [facts.SHAPE.get(n) or () for n in self.returned]
        return 4 * samples * sum(math.prod(s) for s in shapes)

    def run(self, inputs: tuple[Tensor, ...], variant: Variant) -> list[Tensor]:
        """Flat outputs of one variant."""
        for _, found in self.walk(inputs, variant, ()):
            return found
        raise AssertionError

    @torch.no_grad()
    def walk(
        self, inputs: tuple[Tensor, ...], base: Variant, variants: Sequence[Variant]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Run the base once and every variant from where it differs.

        Args:
            inputs: one batch, (N, ...) each.
            base: configuration of the shared part.
            variants: what to run.

        Yields:
            The index of a variant and its flat outputs, in the order in which they differ; at the
            end -1 and the base's outputs.
        """
        starts: dict[int, list[int]] = {}
        for i, variant in enumerate(variants):
            starts.setdefault(self._start(base, variant), []).append(i)
        values: dict[fx.Node, Any] = {}
        memo: dict[fx.Node, Tensor] = {}
        feed = iter([v.to(self.device) for v in inputs])
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = run_node(self.gm, node, values, feed)
        for i, node in enumerate(self.nodes):
            for v in starts.get(i, ()):
                yield v, self._suffix(i, values, memo, base, variants[v])
            self._pull(node, values, memo, base, overwrite=True)
            for done in self.dying[i]:
                values.pop(done, None)
                memo.pop(done, None)
        for v in starts.get(len(self.nodes), ()):
            yield v, self._suffix(len(self.nodes), values, memo, base, variants[v])
        yield -1, self._outputs(values, {}, {}, base)

    def _start(self, base: Variant, variant: Variant) -> int:
        for i, node in enumerate(self.nodes):
            if base.get(node.name, FLOAT) != variant.get(node.name, FLOAT):
                return i
        return len(self.nodes)

    def _dependent(self, base: Variant, variant: Variant) -> list[fx.Node]:
        """The nodes whose value differs between two variants, in order."""
        dirty: dict[fx.Node, None] = {}
        for node in self.nodes:
            changed = base.get(node.name, FLOAT) != variant.get(node.name, FLOAT)
            if changed or any(n in dirty for n in node.all_input_nodes):
                dirty[node] = None
        return list(dirty)

    def _pull(
        self,
        node: fx.Node,
        values: dict[fx.Node, Any],
        memo: dict[fx.Node, Tensor],
        base: Variant,
        overwrite: bool = False,
    ) -> None:
        """Compute a value of the base, and those it needs, if it is not there yet.

        Only the walk itself may overwrite: ahead of it, a later fork may still have to read the
        value.
        """
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [] if top in values else [n for n in top.all_input_nodes if n not in values]
            if missing:
                stack += missing
                continue
            stack.pop()
            if top not in values:
                mine = overwrite and top is node and top in self.in_place
                values[top] = self._evaluate(top, values, memo, base, mine)

    def _suffix(
        self,
        start: int,
        values: dict[fx.Node, Any],
        memo: dict[fx.Node, Tensor],
        base: Variant,
        variant: Variant,
    ) -> list[Tensor]:
        own: dict[fx.Node, Any] = {}
        rounded: dict[fx.Node, Tensor] = {}
        for i in range(start, len(self.nodes)):
            node = self.nodes[i]
            changed = base.get(node.name, FLOAT) != variant.get(node.name, FLOAT)
            inputs = node.all_input_nodes
            if changed or any(n in own for n in inputs):
                for n in inputs:
                    if n not in own and n not in values:
                        self._pull(n, values, memo, base)
                seen = {n: own[n] if n in own else values[n] for n in inputs}
                mine = node in self.in_place and inputs[0] in own
                own[node] = self._evaluate(node, seen, rounded, variant, mine)
            for done in self.dying[i]:
                own.pop(done, None)
                rounded.pop(done, None)
        for n in self.returned:
            if n not in own and n not in values:
                self._pull(n, values, memo, base)
        return self._outputs(values, own, rounded, variant)

    def _outputs(
        self,
        values: Mapping[fx.Node, Any],
        own: Mapping[fx.Node, Any],
        rounded: dict[fx.Node, Tensor],
        variant: Variant,
    ) -> list[Tensor]:
        reads = variant.get(self.output.name, FLOAT).reads
        found: list[Tensor] = []
        for node in self.returned:
            value = own[node] if node in own else values[node]
            if node.name in reads and not self._on_grid(node, variant):
                value = self._rounded(node, value, rounded)
            found.append(value)
        return found

    def _evaluate(
        self,
        node: fx.Node,
        values: dict[fx.Node, Any],
        rounded: dict[fx.Node, Tensor],
        variant: Variant,
        in_place: bool,
    ) -> Any:
        state = variant.get(node.name, FLOAT)
        if in_place and not state.reads:
            return overwrite(self.modules[node], values[node.all_input_nodes[0]])
        seen = dict(values) if state.reads else values
        for n in node.all_input_nodes if state.reads else ():
            if n.name in state.reads and not self._on_grid(n, variant):
                seen[n] = self._rounded(n, seen[n], rounded)
        if state.weight:
            layer: Any = self.modules[node]
            source, bias = node.all_input_nodes[0], layer.bias
            if source.name in state.reads:
                bias = rounded_bias(self.quantized, node, self._params(source)[0])
            weight = rounded_weight(self.quantized, node)
            return with_weight(layer, weight, bias)(seen[source])
        if state.gate:
            return self._gated(node)(seen[node.all_input_nodes[0]])
        return compute(self.gm, self.modules, node, seen)

    def _gated(self, node: fx.Node) -> nn.Module:
        if node not in self.gates:
            self.gates[node] = self.quantized.gated(node)
        return self.gates[node]

    def _on_grid(self, node: fx.Node, variant: Variant) -> bool:
        """What was moved in int8 needs no second rounding."""
        return node.name in self.moved and bool(variant.get(node.name, FLOAT).reads)

    def _rounded(self, node: fx.Node, value: Tensor, rounded: dict[fx.Node, Tensor]) -> Tensor:
        if node not in rounded:
            rounded[node] = round_to_int8(value, *self._params(node))
        return rounded[node]

    def _params(self, node: fx.Node) -> tuple[float, int, QuantSpec]:
        if node not in self.params:
            self.params[node] = value_params(self.quantized, node)
        return self.params[node]


def may_overwrite(gm: fx.GraphModule, node: fx.Node) -> bool:
    """An activation that alone reads the fresh result of a layer: it may write in place."""
    if not is_call(gm, node, *CLIP_TYPES, nn.LeakyReLU, nn.SiLU, nn.Hardswish):
        return False
    (before,) = node.all_input_nodes
    return is_layer(gm, before) and len(before.users) == 1


def overwrite(m: Any, x: Tensor) -> Tensor:
    """The result of an activation, written over what it reads."""
    if type(m) is nn.LeakyReLU:
        return functional.leaky_relu_(x, m.negative_slope)
    if type(m) is nn.ReLU:
        return functional.relu_(x)
    if type(m) is nn.SiLU:
        return functional.silu(x, inplace=True)
    if type(m) is nn.Hardswish:
        return functional.hardswish(x, inplace=True)
    bounds = clip_bounds(m)
    assert bounds is not None
    return functional.hardtanh_(x, *bounds)
