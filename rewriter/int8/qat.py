"""Fake quantization whose step sizes are trained together with the weights.

    y = s (clip(round(x / s) + z, qmin, qmax) - z)

    dy/dx = 1 inside the range, 0 outside
    dy/ds = round(x / s) - x / s inside, and the integer that x is cut off at outside

A step is s = s_0 exp(t) with t trained from 0, so that one learning rate serves all steps and none becomes negative. Zero points
stay as they were calibrated: zero must remain exact. Source: Esser et al., 2020 (arXiv:1902.08153), whose gradient this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph.edit import copy_graph
from rewriter.graph.lookup import module_of
from rewriter.int8.annotate import annotation
from rewriter.int8.calibrate import input_scale
from rewriter.int8.integer_grid import LARGEST_BIAS, ends, least_weight_scale, on_axis, on_grid
from rewriter.int8.scheme import TINY, QuantSpec
from rewriter.int8.simulate import FakeQuantize, Quantized, QuantizedLayer, simulate


class _Grid(torch.autograd.Function):
    """Rounding to a grid, with the gradients above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        y = on_grid(x, scale, low, high)
        ctx.save_for_backward(x, y, scale)
        ctx.ends = low, high
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, y, scale = ctx.saved_tensors
        low, high = ctx.ends
        inside = (x >= low * scale).logical_and_(x <= high * scale)
        dx = g * inside
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        # inside: (y - x) / s; outside: y / s
        total = (g * y - dx * x).sum_to_size(scale.shape)
        return dx, total / scale, None, None


def to_grid(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """``x`` rounded to ``scale`` times the whole numbers from low to high; gradients to both tensors.

    Args:
        x: any shape.
        scale: (), or a shape that broadcasts to that of x.
        low: smallest integer, zero point taken off.
        high: largest integer, zero point taken off.
    """
    return _Grid.apply(x, scale, low, high)  # type: ignore[no-any-return]


class LearnedQuantize(nn.Module):
    """Rounds its input to int8 values of one step, which may be trained."""

    start: Tensor

    def __init__(self, fake: FakeQuantize, log_step: nn.Parameter) -> None:
        super().__init__()
        self.log_step, self.zero_point, self.spec = log_step, fake.zero_point, fake.spec
        self.register_buffer("start", torch.tensor(fake.scale), persistent=False)

    @property
    def scale(self) -> Tensor:
        return self.start * self.log_step.exp()

    def forward(self, x: Tensor) -> Tensor:
        # what is on the grid must stay on it where autocast would halve the precision
        spec, zero = self.spec, self.zero_point
        return to_grid(x.float(), self.scale, *ends(spec, zero))


class LearnedLayer(nn.Module):
    """A layer that reads int8 and has int8 weights, all of it trained."""

    layer: Any
    start: Tensor

    def __init__(
        self, quantized: QuantizedLayer, log_step: nn.Parameter, read: LearnedQuantize | None
    ) -> None:
        super().__init__()
        self.layer, self.read, self.log_step = quantized.layer, read, log_step
        self.spec, self.axis = quantized.spec, quantized.axis
        self.register_buffer("start", quantized.scale.clone(), persistent=False)

    @property
    def scale(self) -> Tensor:
        return self.start * self.log_step.exp()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        scale = on_axis(self.scale, weight, self.axis)
        tensors = {"weight": to_grid(weight, scale, self.spec.qmin, self.spec.qmax)}
        if self.read is not None:
            x = self.read(x)
            if self.layer.bias is not None:
                step = (self.read.scale * self.scale).detach()
                tensors["bias"] = to_grid(self.layer.bias, step, -LARGEST_BIAS - 1, LARGEST_BIAS)
        return torch.func.functional_call(self.layer, tensors, (x,))


@dataclass(frozen=True)
class Learned:
    """A quantized network in training.

    Args:
        gm: computes what ``simulate`` does,; its parameters are what is trained.
        origin: what it was made of; it is not touched.
        values: log of the factor on the step of each int8 value, by the owner of the range.
        weights: log of the factors on the weight scales, by node name.
    """

    gm: fx.GraphModule
    origin: Quantized
    values: Mapping[str, nn.Parameter]
    weights: Mapping[str, nn.Parameter]

    def quantized(self) -> Quantized:
        """The network as it is now trained: its weights, scales and ranges, detached."""
        gm = copy_graph(self.origin.gm)
        inner = {str(n.target) for n in gm.graph.nodes if n.name in self.weights}
        trained = self.gm.state_dict()
        state: dict[str, Tensor] = {}
        for name in gm.state_dict():
            owner, _, last = name.rpartition(".")
            state[name] = trained[f"{owner}.layer.{last}" if owner in inner else name]
        gm.load_state_dict(state, strict=True)
        old = self.origin.calibration
        values = dict(old.values)
        for node in gm.graph.nodes:
            note = annotation(node)
            if note.output is not None and note.range_of in self.values:
                factor = float(self.values[note.range_of].detach().exp())
                values[note.range_of] = _ends(self.origin, node, factor)
        weights = dict(old.weights)
        for name, log_step in self.weights.items():
            weights[name] = (old.weights[name] * log_step.detach().cpu().exp()).float()
        for node in gm.graph.nodes:
            if node.name in weights:
                least = _least_scale(gm, node, values, weights[node.name])
                weights[node.name] = torch.maximum(weights[node.name], least).clamp_min(TINY)
        return replace(
            self.origin, gm=gm, calibration=replace(old, values=values, weights=weights)
        )


def learnable(quantized: Quantized, ranges: bool = True) -> Learned:
    """A copy of a quantized network whose weights, and step sizes if asked for, can be trained.

    Args:
        quantized: annotated graph and its ranges.
        ranges: train the steps of values and of weights too; otherwise they stay as they are.
    """
    gm = simulate(quantized)
    values: dict[str, nn.Parameter] = {}
    weights: dict[str, nn.Parameter] = {}

    def learned(fake: FakeQuantize, owner: str) -> LearnedQuantize:
        if owner not in values:
            trained = ranges and fake.spec.fixed is None
            values[owner] = nn.Parameter(torch.zeros(()), requires_grad=trained)
        return LearnedQuantize(fake, values[owner])

    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module: Any = module_of(gm, node)
        if isinstance(module, QuantizedLayer):
            read = module.read and learned(module.read, annotation(node.args[0]).range_of)
            weights[node.name] = nn.Parameter(torch.zeros_like(module.scale), requires_grad=ranges)
            layer = LearnedLayer(module, weights[node.name], read)
            gm.set_submodule(str(node.target), layer)
        elif isinstance(module, FakeQuantize):
            owner = annotation(node.args[0]).range_of
            gm.set_submodule(str(node.target), learned(module, owner))
    trained = {id(p) for p in (*values.values(), *weights.values())}
    for parameter in gm.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(True)
    return Learned(gm, quantized, values, weights)


def _ends(quantized: Quantized, node: fx.Node, factor: float) -> tuple[float, float]:
    """The range whose scale is ``factor`` times the present one, at the same zero point."""
    spec: QuantSpec | None = annotation(node).output
    assert spec is not None, node.name
    scale, zero = quantized.value_params(node)
    step = float(torch.tensor(scale) * factor)
    if spec.symmetric:
        return -spec.qmax * step, spec.qmax * step
    return (spec.qmin - zero) * step, (spec.qmax - zero) * step


def _least_scale(
    gm: fx.GraphModule, node: fx.Node, values: dict[str, tuple[float, float]], scale: Tensor
) -> Tensor:
    """The weight scale below which the int32 bias would overflow."""
    layer, step = module_of(gm, node), input_scale(gm, node, values)
    if layer.bias is None or step is None:
        return torch.zeros_like(scale)
    return least_weight_scale(layer.bias, step, scale.ndim > 0).float()
