"""One walk through the quantized graph, beside the float one, that repairs each layer under the int8 errors before it.

Both networks run in step, node by node, on the calibration inputs, so a layer is seen with the
inputs that it will have: those already rounded and repaired upstream. At each layer the rounding of
its weights is chosen (``rewriter.repair.weight_rounding``), and its bias is set so that the mean of
every output channel is that of the float layer. One pass, whatever the depth.
Source: bias correction, Nagel et al., 2019 (arXiv:1906.04721), section 4.2 and appendix D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import copy_graph
from rewriter.graph.interpret import clips_in_place, last_uses, run_node
from rewriter.graph.lookup import is_call, module_of
from rewriter.int8.annotate import annotation, is_layer, moves_values
from rewriter.int8.calibrate import input_scale
from rewriter.int8.integer_grid import dequantized_weight, least_weight_scale, round_to_int8
from rewriter.int8.scheme import TINY, QuantSpec, channel_axis
from rewriter.int8.simulate import Quantized
from rewriter.repair.alike import Alike, input_noise
from rewriter.repair.known_layers import KnownLayers, Repaired
from rewriter.repair.layer_patches import patches
from rewriter.repair.weight_rounding import (
    DAMPING,
    MomentSums,
    best_scale,
    reproducing,
    round_weights,
)
from rewriter.storage.cache import Store

# Inputs that the repairs look at: with a third less the damage on others grows, with twice as many it stays.
INPUTS = 48
# Live values of all inputs together may take this many bytes; fewer inputs are used where they would take more.
MEMORY = 3 * 2**30


def refine(
    quantized: Quantized,
    batches: Sequence[Tensor | tuple[Tensor, ...]],
    repairs: frozenset[str],
    store: Store | None = None,
    alike: Alike | None = None,
) -> Quantized:
    """Repair every int8 layer in the order in which they run.

    Args:
        quantized: annotated graph and its ranges; it is not touched.
        batches: unlabelled calibration inputs, each (N, ...), or a tuple with one tensor for each input.
        repairs: what to do: "biases", or "rounding", which leaves every mean to the bias and so corrects it too.
        store: where repaired layers are kept for plans that begin like this one.
        alike: a repaired network that this one differs from at a few places: layers that are the same there and find inputs as noisy
            take its rounded weights.

    Returns:
        A copy with new weights (on their grid where they were rounded), biases and weight scales.
    """
    gm = copy_graph(quantized.gm)
    scales = dict(quantized.calibration.weights)
    result = replace(quantized, gm=gm, calibration=replace(quantized.calibration, weights=scales))
    inputs = _in_two(_affordable(quantized.gm, batches))
    last = last_uses(quantized.gm)
    count = sum(len(x[0]) for x in inputs)
    # what comes of another network's repairs is not that of this one alone
    known = KnownLayers(quantized, batches, count, repairs, store if alike is None else None)
    exact, rounded = _Side(quantized, inputs, _inside), _Side(result, inputs, _rounded)
    with torch.no_grad():
        for node, twin in zip(quantized.gm.graph.nodes, gm.graph.nodes, strict=True):
            if node.op == "output":
                break
            if is_layer(gm, node) and annotation(node).weight is not None:
                _repair(result, node, twin, exact, rounded, repairs, known, alike)
            else:
                exact.run(node)
                rounded.run(twin)
            exact.settle(node)
            rounded.settle(twin)
            exact.forget(last.get(node, ()))
            rounded.forget(last.get(node, ()))
    return result


class _Side:
    """One of the two networks as it runs on all batches: its live values, by the names of their nodes.

    What the float network's layers read is cut off where int8 ends: a range that was drawn in cuts off what the answers
    do not need (``rewriter.repair.activation_ranges``), and it must not be made good: a few outliers would move
    the bias and the weights for all inputs. What the other's read is rounded too.

    Args:
        quantized: the network and its ranges.
        inputs: of each batch.
        read: what a reader in int8 makes of a value; in place where it is told so.
    """

    def __init__(
        self,
        quantized: Quantized,
        inputs: list[tuple[Tensor, ...]],
        read: Callable[[Quantized, fx.Node, Tensor, bool], Tensor],
    ) -> None:
        self.quantized, self.gm, self._read = quantized, quantized.gm, read
        self.values: list[dict[str, Any]] = [{} for _ in inputs]
        self._feeds = [iter(x) for x in inputs]
        self._settled: set[str] = set()
        self._clips = clips_in_place(self.gm)

    def run(self, node: fx.Node) -> list[Any]:
        """The value of a node on each batch; kept."""
        for values, feed in zip(self.values, self._feeds, strict=True):
            reads = {n: self.as_read(node, n, values) for n in node.all_input_nodes}
            if node in self._clips:
                values[node.name] = reads[node.all_input_nodes[0]].clamp_(*self._clips[node])
            else:
                values[node.name] = run_node(self.gm, node, reads, feed)
        return [values[node.name] for values in self.values]

    def as_read(self, node: fx.Node, source: fx.Node, values: dict[str, Any]) -> Any:
        """The value of one of a node's arguments as the node reads it."""
        value = values[source.name]
        if source.name in self._settled or source.name not in _reads(node):
            return value
        return self._read(self.quantized, source, value, False)

    def settle(self, node: fx.Node) -> None:
        """Read a value once for all of its readers, in its own memory where nobody else has it."""
        if not node.users or any(node.name not in _reads(u) for u in node.users):
            return
        self._settled.add(node.name)
        if moves_values(self.gm, node) and _reads(node):
            return  # what was moved had been read
        for values in self.values:
            value = values[node.name]
            owned = node.op != "placeholder" and _storage(value) not in {
                _storage(values[n.name]) for n in node.all_input_nodes
            }
            values[node.name] = self._read(self.quantized, node, value, owned)

    def forget(self, nodes: Iterable[fx.Node]) -> None:
        for values in self.values:
            for node in nodes:
                del values[node.name]


def _reads(node: fx.Node) -> tuple[str, ...]:
    return annotation(node).reads if facts.INT8.known(node) else ()


def _storage(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0


def _affordable(
    gm: fx.GraphModule, batches: Sequence[Tensor | tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    """As many of the inputs as are needed, and as the live values of two networks leave room for."""
    dying, live, peak = last_uses(gm), 0, 1
    for node in gm.graph.nodes:
        live += _size(node)
        peak = max(peak, live)
        live -= sum(_size(n) for n in dying.get(node, ()))
    left = min(INPUTS, max(1, MEMORY // (8 * peak)))  # two networks, 4 bytes
    chosen: list[tuple[Tensor, ...]] = []
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        part = tuple(x[:left] for x in inputs)
        left -= len(part[0])
        chosen.append(part)
        if left <= 0:
            break
    return chosen


def _in_two(batches: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The same inputs in an even number of batches, each second of which judges what the others were fitted to; in two if they can be."""
    if len({tuple(x.shape[1:] for x in batch) for batch in batches}) == 1:
        batches = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    halves = [zip(*(x.tensor_split(2) for x in batch), strict=True) for batch in batches]
    return [half for two in halves for half in two if len(half[0])]


def _size(node: fx.Node) -> int:
    shape = facts.SHAPE.get(node)
    if node.op == "get_attr" or not isinstance(shape, tuple):
        return 0
    return math.prod(shape) if all(isinstance(s, int) for s in shape) else 0


def _inside(quantized: Quantized, value: fx.Node, x: Tensor, in_place: bool) -> Tensor:
    """A value cut off where int8 ends."""
    spec = annotation(value).output
    assert spec is not None, value.name
    scale, zero = quantized.value_params(value)
    low, high = (spec.qmin - zero) * scale, (spec.qmax - zero) * scale
    return x.clamp_(low, high) if in_place else x.clamp(low, high)


def _rounded(quantized: Quantized, value: fx.Node, x: Tensor, in_place: bool) -> Tensor:
    """A value as int8 holds it."""
    spec = annotation(value).output
    assert spec is not None, value.name
    return round_to_int8(x, *quantized.value_params(value), spec, in_place)


def _repair(
    quantized: Quantized,
    original: fx.Node,
    node: fx.Node,
    exact: _Side,
    rounded: _Side,
    repairs: frozenset[str],
    known: KnownLayers,
    alike: Alike | None,
) -> None:
    """Choose the layer's int8 weights and bias, and run it.

    Args:
        quantized: the network under repair; it is edited.
        original: the layer in the network as it was.
        node: the layer in the network under repair.
        exact: the network as it was.
        rounded: the network under repair.
        repairs: what to do.
        known: layers that were repaired before; this one is added.
        alike: the network whose rounded weights are taken where they fit.
    """
    layer: Any = module_of(quantized.gm, node)
    spec = annotation(node).weight
    before, source = original.args[0], node.args[0]
    assert spec is not None
    assert isinstance(before, fx.Node)
    assert isinstance(source, fx.Node)
    inputs = [rounded.as_read(node, source, values) for values in rounded.values]
    found = known.get(original)
    rounds = "rounding" in repairs and is_call(quantized.gm, node, nn.Conv1d, nn.Conv2d, nn.Linear)
    if found is not None:
        if found.weight is not None:
            layer.weight = nn.Parameter(found.weight, requires_grad=False)
        quantized.calibration.weights[node.name] = found.scale
    elif rounds:
        clipped = [exact.as_read(original, before, values) for values in exact.values]
        noise = input_noise(clipped, inputs)
        facts.NOISE.put(node, noise)
        given = None if alike is None else alike.layer_for(exact.quantized, original)
        if alike is not None and given is not None and alike.as_noisy(node, noise):
            layer.weight = nn.Parameter(given[0].clone(), requires_grad=False)
            quantized.calibration.weights[node.name] = given[1]
        else:
            _round(quantized, node, layer, spec, clipped, inputs)
    scale = quantized.calibration.weights[node.name]
    weight = dequantized_weight(layer.weight, scale, spec, channel_axis(layer, spec))
    made = [torch.func.functional_call(layer, {"weight": weight}, (x,)) for x in inputs]
    wanted = exact.run(original)
    if repairs & {"biases", "rounding"}:
        axis = made[0].ndim - 1 if isinstance(layer, nn.Linear) else 1
        if found is None:
            shift = _mean(wanted, axis) - _mean(made, axis)
            known.put(original, Repaired(layer.weight if rounds else None, scale, shift))
        else:
            shift = found.shift
        old = layer.bias.double() if layer.bias is not None else 0.0
        layer.bias = nn.Parameter((old + shift).to(layer.weight.dtype), requires_grad=False)
        wide = shift.to(made[0]).view([-1 if d == axis else 1 for d in range(made[0].ndim)])
        for m in made:
            m.add_(wide)
    for values, value in zip(rounded.values, made, strict=True):
        values[node.name] = value


def _mean(parts: list[Tensor], axis: int) -> Tensor:
    """(C,) mean over all samples and positions."""
    # sums of one batch in float32 are pairwise, and a twentieth of the time of float64
    total = torch.stack([_sum(p, axis).double() for p in parts]).sum(0)
    return total / (sum(p.numel() for p in parts) // parts[0].shape[axis])


def _sum(x: Tensor, axis: int) -> Tensor:
    if x.ndim == 4 and axis == 1 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).flatten(1, 2).sum(1).double().sum(0)
    return x.sum([d for d in range(x.ndim) if d != axis])


def _round(
    quantized: Quantized,
    node: fx.Node,
    layer: Any,
    spec: QuantSpec,
    exact: list[Tensor],
    rounded: list[Tensor],
) -> None:
    """Give the layer weights that lie on an int8 grid and reproduce the float output; edits the layer and its scale."""
    sums = MomentSums()
    inputs = sum(len(x) for x in exact)
    for i, part in enumerate(zip(exact, rounded, strict=True)):
        seen, found = patches(layer, part, inputs, seed=i)
        sums.add(seen, found, half=i % 2)
    moments = sums.moments()
    groups = getattr(layer, "groups", 1)
    flat = layer.weight.detach().double().flatten(1)
    weight = flat.unflatten(0, (groups, -1))
    wanted = reproducing(weight, sums)
    axis = channel_axis(layer, spec)
    largest = wanted.abs().amax(2, keepdim=True) / spec.qmax
    if axis is None:
        largest = largest.amax().expand_as(largest)
    least = (
        _least_scale(quantized, node, layer, axis).view_as(largest)
        if axis is not None
        else _least_scale(quantized, node, layer, axis)
    )
    scale = best_scale(wanted, largest, moments.hessian, spec.qmin, spec.qmax, axis is None)
    scale = torch.maximum(scale, least).clamp_min(TINY).float().double()
    damping = DAMPING + weight.shape[2] / moments.places
    q = round_weights(wanted, scale, moments.hessian, spec.qmin, spec.qmax, damping)
    layer.weight = nn.Parameter(
        (q * scale).flatten(0, 1).view_as(layer.weight).to(layer.weight.dtype), requires_grad=False
    )
    steps = scale.flatten()
    quantized.calibration.weights[node.name] = (steps if axis is not None else steps[0]).float()


def _least_scale(quantized: Quantized, node: fx.Node, layer: Any, axis: int | None) -> Tensor:
    """The weight scale below which the int32 bias overflows, with a factor 2 to spare."""
    step = input_scale(quantized.gm, node, quantized.calibration.values)
    if layer.bias is None or step is None:
        rows = layer.weight.shape[0]
        return torch.zeros(rows if axis is not None else (), dtype=torch.float64)
    return least_weight_scale(layer.bias.double(), step, axis is not None)
