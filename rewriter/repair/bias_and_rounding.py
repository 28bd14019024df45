"""One walk through the quantized graph, beside the float one, that repairs each layer under the int8 errors before it.

Both networks run in step, node by node, on the calibration inputs, so a layer is seen with the
inputs that it will have: those already rounded and repaired upstream. At each layer the rounding of
its weights is chosen (``rewriter.repair.weight_rounding``), and its bias is set so that the mean of
every output channel is that of the float layer. One pass, whatever the depth.
Source: bias correction, Nagel et al., 2019 (arXiv:1906.04721), section 4.2 and appendix D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import copy_graph
from rewriter.graph.interpret import last_uses, run_node
from rewriter.graph.lookup import is_call, module_of
from rewriter.int8.annotate import annotation, is_layer
from rewriter.int8.calibrate import input_scale
from rewriter.int8.scheme import (
    TINY,
    QuantSpec,
    channel_axis,
    dequantized_weight,
    fake_quantize,
)
from rewriter.int8.simulate import Quantized
from rewriter.repair.weight_rounding import (
    DAMPING,
    MomentSums,
    best_scale,
    patches,
    reproducing,
    round_weights,
)

# Live values of all inputs together may take this many bytes; fewer inputs are used where they would take more.
MEMORY = 3 * 2**30


def refine(
    quantized: Quantized, batches: Sequence[Tensor | tuple[Tensor, ...]], repairs: frozenset[str]
) -> Quantized:
    """Repair every int8 layer in the order in which they run.

    Args:
        quantized: annotated graph and its ranges; it is not touched.
        batches: unlabelled calibration inputs, each (N, ...), or a tuple with one tensor for each input.
        repairs: what to do: "biases", or "rounding", which leaves every mean to the bias and so corrects it too.

    Returns:
        A copy with new weights (on their grid where they were rounded), biases and weight scales.
    """
    gm = copy_graph(quantized.gm)
    scales = dict(quantized.calibration.weights)
    result = replace(quantized, gm=gm, calibration=replace(quantized.calibration, weights=scales))
    inputs = _affordable(quantized.gm, batches)
    twins = dict(zip(quantized.gm.graph.nodes, gm.graph.nodes, strict=True))
    last = last_uses(quantized.gm)
    exact: list[dict[fx.Node, Any]] = [{} for _ in inputs]
    rounded: list[dict[fx.Node, Any]] = [{} for _ in inputs]
    feeds = [(iter(x), iter(x)) for x in inputs]
    with torch.no_grad():
        for node, twin in twins.items():
            if node.op == "output":
                break
            clipped = [_clipped(quantized, node, values) for values in exact]
            for values, reads, feed in zip(exact, clipped, feeds, strict=True):
                values[node] = run_node(quantized.gm, node, reads, feed[0])
            if is_layer(gm, node) and annotation(node).weight is not None:
                wanted = [values[node] for values in exact]
                _repair(result, twin, node, clipped, wanted, rounded, repairs)
            else:
                for values, feed in zip(rounded, feeds, strict=True):
                    values[twin] = run_node(gm, twin, _as_read(result, twin, values), feed[1])
            for used in last.get(node, ()):
                for values in exact:
                    del values[used]
                for values in rounded:
                    del values[twins[used]]
    return result


def _affordable(
    gm: fx.GraphModule, batches: Sequence[Tensor | tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    """As many of the inputs as the live values of two networks leave room for."""
    dying, live, peak = last_uses(gm), 0, 1
    for node in gm.graph.nodes:
        live += _size(node)
        peak = max(peak, live)
        live -= sum(_size(n) for n in dying.get(node, ()))
    left = max(1, MEMORY // (8 * peak))  # two networks, 4 bytes
    chosen: list[tuple[Tensor, ...]] = []
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        part = tuple(x[:left] for x in inputs)
        left -= len(part[0])
        chosen.append(part)
        if left <= 0:
            break
    return chosen


def _size(node: fx.Node) -> int:
    shape = facts.SHAPE.get(node)
    if node.op == "get_attr" or not isinstance(shape, tuple):
        return 0
    return math.prod(shape) if all(isinstance(s, int) for s in shape) else 0


def _as_read(
    quantized: Quantized, node: fx.Node, values: dict[fx.Node, Any]
) -> dict[fx.Node, Any]:
    """The values of a node's arguments as it reads them."""
    names = annotation(node).reads if facts.INT8.known(node) else ()
    return {
        n: _rounded(quantized, n, values[n]) if n.name in names else values[n]
        for n in node.all_input_nodes
    }


def _clipped(
    quantized: Quantized, node: fx.Node, values: dict[fx.Node, Any]
) -> dict[fx.Node, Any]:
    """The float values of a node's arguments, cut off where int8 ends.

    A range that was drawn in cuts off what the answers do not need (``rewriter.repair.activation_ranges``). It must not be made good: a few
    outliers would move the bias and the weights for all inputs.
    """
    names = annotation(node).reads if facts.INT8.known(node) else ()
    return {
        n: _inside(quantized, n, values[n]) if n.name in names else values[n]
        for n in node.all_input_nodes
    }


def _inside(quantized: Quantized, value: fx.Node, x: Tensor) -> Tensor:
    spec = annotation(value).output
    assert spec is not None, value.name
    scale, zero = quantized.value_params(value)
    return x.clamp((spec.qmin - zero) * scale, (spec.qmax - zero) * scale)


def _rounded(quantized: Quantized, value: fx.Node, x: Tensor) -> Tensor:
    spec = annotation(value).output
    assert spec is not None, value.name
    return fake_quantize(x, *quantized.value_params(value), spec)


def _repair(
    quantized: Quantized,
    node: fx.Node,
    original: fx.Node,
    clipped: list[dict[fx.Node, Any]],
    exact: list[Tensor],
    rounded: list[dict[fx.Node, Any]],
    repairs: frozenset[str],
) -> None:
    """Choose the layer's int8 weights and bias, and run it.

    Args:
        quantized: the network under repair; it is edited.
        node: the layer in it.
        original: the layer in the network as it was.
        clipped: what the original reads, for each batch.
        exact: what it gives.
        rounded: the values of the network under repair.
        repairs: what to do.
    """
    layer: Any = module_of(quantized.gm, node)
    spec = annotation(node).weight
    source = node.args[0]
    assert spec is not None
    assert isinstance(source, fx.Node)
    inputs = [_as_read(quantized, node, values)[source] for values in rounded]
    if "rounding" in repairs and is_call(quantized.gm, node, nn.Conv1d, nn.Conv2d, nn.Linear):
        before = original.args[0]
        assert isinstance(before, fx.Node)
        _round(quantized, node, layer, spec, [reads[before] for reads in clipped], inputs)
    scale = quantized.calibration.weights[node.name]
    weight = dequantized_weight(layer.weight, scale, spec, channel_axis(layer, spec))
    made = [torch.func.functional_call(layer, {"weight": weight}, (x,)) for x in inputs]
    if repairs & {"biases", "rounding"}:
        axis = made[0].ndim - 1 if isinstance(layer, nn.Linear) else 1
        shift = _mean(exact, axis) - _mean(made, axis)
        old = layer.bias.double() if layer.bias is not None else 0.0
        layer.bias = nn.Parameter((old + shift).to(layer.weight.dtype), requires_grad=False)
        wide = shift.to(made[0]).view([-1 if d == axis else 1 for d in range(made[0].ndim)])
        made = [m + wide for m in made]
    for values, value in zip(rounded, made, strict=True):
        values[node] = value


def _mean(parts: list[Tensor], axis: int) -> Tensor:
    """(C,) mean over all samples and positions."""
    axes = [d for d in range(parts[0].ndim) if d != axis]
    # sums of one batch in float32 are pairwise, and a twentieth of the time of float64
    total = torch.stack([p.sum(axes).double() for p in parts]).sum(0)
    return total / (sum(p.numel() for p in parts) // parts[0].shape[axis])


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
    for i, (x, y) in enumerate(zip(exact, rounded, strict=True)):
        middle = (len(x) + 1) // 2
        for half, part in enumerate(((x[:middle], y[:middle]), (x[middle:], y[middle:]))):
            if len(part[0]):
                before, after = patches(layer, part, inputs, seed=2 * i + half)
                sums.add(before, after, half)
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
    bias = layer.bias.detach().abs().double()
    return (bias if axis is not None else bias.amax()) / (step * 2.0**30)
