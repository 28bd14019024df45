"""A float graph that computes what the int8 kernels compute: fake quantization in torch.

Runs on any device and is differentiable (straight-through), so it serves screening, fitting and
training, and scores candidates for targets whose kernels are not at hand.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import module_of
from rewriter.int8.annotate import annotate, annotation, is_layer, moves_values
from rewriter.int8.calibrate import Calibration, Method, calibrate
from rewriter.int8.fixed_point import FixedPointAdd, FixedPointAverage, FixedPointMultiply, scaled
from rewriter.int8.integer_grid import (
    bias_steps,
    dequantized_weight,
    fake_quantize,
    quantize_weight,
    rounded_bias,
    steps,
)
from rewriter.int8.scheme import CLIPS, QuantScheme, QuantSpec, channel_axis


@dataclass(frozen=True)
class Quantized:
    """An annotated canonical graph and its ranges: all that an int8 engine needs."""

    gm: fx.GraphModule
    calibration: Calibration
    scheme: QuantScheme

    def value_params(self, node: fx.Node) -> tuple[float, int]:
        """Scale and zero point of the int8 value that ``node`` makes."""
        note = annotation(node)
        assert note.output is not None, node.name
        return note.output.params(*self.calibration.values[note.range_of])

    def gate_params(self, node: fx.Node) -> tuple[float, int]:
        """Scale and zero point of the gate g of an activation x g(x), over the int8 values that x can take."""
        fixed = self.scheme.fixed("sigmoid")
        if fixed is not None:
            return fixed
        note, (source,) = annotation(node), node.all_input_nodes
        spec = annotation(source).output
        assert note.output is not None and spec is not None, node.name
        scale, zero = self.value_params(source)
        most = torch.tensor((spec.qmax - zero) * scale)
        highest = float(_gate_of(module_of(self.gm, node))(most))
        return note.output.params(0.0, highest or 1.0)

    def gated(self, node: fx.Node) -> GatedActivation:
        """An activation of two kernels with the int8 value between them."""
        spec = annotation(node).output
        assert spec is not None, node.name
        return GatedActivation(_gate_of(module_of(self.gm, node)), self.gate_params(node), spec)


def _gate_of(module: nn.Module) -> nn.Module:
    return nn.Hardsigmoid() if isinstance(module, nn.Hardswish) else nn.Sigmoid()


class FakeQuantize(nn.Module):
    """Rounds its input to int8 values of one scale while ``enabled``."""

    def __init__(self, scale: float, zero_point: int, spec: QuantSpec) -> None:
        super().__init__()
        self.scale, self.zero_point, self.spec = scale, zero_point, spec
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        return fake_quantize(x, self.scale, self.zero_point, self.spec)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}, zero_point={self.zero_point}"


class QuantizedLayer(nn.Module):
    """A layer that reads int8 and has int8 weights while ``enabled``; otherwise the float layer.

    The input is quantized here and not where the value is made, so that one layer can be
    switched alone.
    """

    layer: Any
    scale: Tensor

    def __init__(
        self,
        layer: nn.Module,
        scale: Tensor,
        spec: QuantSpec,
        read: FakeQuantize | None,
        float_bias: bool = False,
    ) -> None:
        super().__init__()
        self.float_bias = float_bias
        self.layer, self.read, self.spec = layer, read, spec
        self.axis = channel_axis(layer, spec)
        self.register_buffer("scale", scale.clone())
        self.enabled = True
        self.writes: float | None = None
        self.fixed_point = False
        self._rounded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.layer(x)
        if self.writes is not None and self.read is not None:
            return self._kernel(x, self.read, self.writes)
        tensors = {"weight": self.weight()}
        if self.read is not None:
            x = self.read(x)
            if self.layer.bias is not None and not self.float_bias:
                tensors["bias"] = self.bias()
        return torch.func.functional_call(self.layer, tensors, (x,))

    def _kernel(self, x: Tensor, read: FakeQuantize, writes: float) -> Tensor:
        """What an integer kernel computes: whole numbers, exact in float32, requantized by one factor.

        Products with 16-bit inputs need float64 to be exact.
        """
        layer, device, exact = self.layer, x.device, _exact_type(read.spec, x.dtype)
        if self._rounded is None or self._rounded.device != device:
            q = quantize_weight(layer.weight, self.scale, self.spec, self.axis)
            self._rounded = q.to(exact)
        step = self.scale * torch.tensor(read.scale, dtype=torch.float32, device=device)
        tensors = {"weight": self._rounded}
        if layer.bias is not None:
            bias = bias_steps(layer.bias, step)
            if self.float_bias:
                bias = layer.bias.double() / step.double()
            tensors["bias"] = bias.to(exact)
        whole = steps(read(x), read.scale).to(exact)
        total = torch.func.functional_call(layer, tensors, (whole,))
        written = torch.tensor(writes, dtype=torch.float32, device=device)
        # multipliers of integers are made from factors in float64
        factor = step.double() / written.double() if self.fixed_point else step / written
        if factor.ndim:
            channels = total.ndim - 1 if isinstance(layer, nn.Linear) else 1
            factor = factor.view([-1 if d == channels else 1 for d in range(total.ndim)])
        q = scaled(total, factor) if self.fixed_point else torch.round(total * factor)
        return (q * writes).to(x.dtype)

    def weight(self) -> Tensor:
        """The weight as int8 holds it; computed once while it is not being trained."""
        weight, scale = self.layer.weight, self.scale
        if weight.requires_grad:
            return dequantized_weight(weight, scale, self.spec, self.axis)
        if self._rounded is None or self._rounded.device != weight.device:
            self._rounded = dequantized_weight(weight, scale, self.spec, self.axis)
        return self._rounded

    def bias(self) -> Tensor:
        """The bias as int32 holds it: in steps of input scale x weight scale."""
        assert self.read is not None
        bias: Tensor = self.layer.bias
        step = self.read.scale * self.scale
        rounded = rounded_bias(bias, step)
        return bias + (rounded - bias.detach()) if bias.requires_grad else rounded

    def refresh(self) -> None:
        """Forget the rounded weight after the weight was changed."""
        self._rounded = None


class GatedActivation(nn.Module):
    """x g(x) where the gate g is an int8 value of its own, as runtimes without one kernel for both compute it."""

    def __init__(self, gate: nn.Module, inner: tuple[float, int], spec: QuantSpec) -> None:
        super().__init__()
        self.function, self.gate = gate, FakeQuantize(*inner, replace(spec, fixed=inner))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.function(x))


class IntegerAdd(nn.Module):
    """The sum of two int8 values as ONNX Runtime's QLinearAdd computes it.

    Two fused multiply-adds in float32, on the stored integers, with what the zero points contribute computed beforehand.
    """

    def __init__(self, *params: tuple[float, int]) -> None:
        super().__init__()
        (a, zero_a), (b, zero_b), (out, zero) = params
        scales = torch.tensor([a, b, out], dtype=torch.float32)
        self.ratios = (scales[:2] / scales[2]).double().tolist()
        self.scales, self.zeros = (a, b, out), (zero_a, zero_b, zero)
        shift = torch.tensor(self.ratios[1] * zero_b).float().double()
        inner = (self.ratios[0] * zero_a + shift).float().double()
        self.fixed = float((zero - inner).float())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # float64 holds a product of two float32 exactly, and so stands for the fused operation
        a = steps(x, self.scales[0]).double() + self.zeros[0]
        b = steps(y, self.scales[1]).double() + self.zeros[1]
        inner = (b * self.ratios[1] + self.fixed).float().double()
        total = torch.round((a * self.ratios[0] + inner).float())
        return (total - self.zeros[2]) * self.scales[2]


def quantize(
    gm: fx.GraphModule,
    scheme: QuantScheme,
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    method: Method = "minmax",
    histograms: bool = False,
) -> Quantized:
    """Annotate (in place) and calibrate a canonical graph for a target."""
    annotate(gm, scheme)
    return Quantized(gm, calibrate(gm, batches, method, histograms), scheme)


def simulate(
    quantized: Quantized, kernels: bool = False, fixed_point: bool | None = None
) -> fx.GraphModule:
    """A copy of the graph with fake quantization at every annotated place; the same outputs.

    Args:
        quantized: annotated graph and its ranges.
        kernels: compute every layer as integer kernels do, whole numbers first and one requantization last, instead of
            in rounded floats. Equal to ONNX Runtime's kernels to the last bit but for ties; for inference
            only, and with all switches on.
        fixed_point: with ``kernels``, requantize by an integer multiplier and a shift; None: as the target's reference
            kernels do.
    """
    fixed_point = quantized.scheme.fixed_point if fixed_point is None else fixed_point
    gm = copy.deepcopy(quantized.gm)
    for before, after in zip(quantized.gm.graph.nodes, gm.graph.nodes, strict=True):
        facts.INT8.put(after, annotation(before))
    by_name = {n.name: n for n in gm.graph.nodes}
    for before, node in zip(quantized.gm.graph.nodes, list(gm.graph.nodes), strict=True):
        note = annotation(node)
        if is_layer(gm, node) and note.weight is not None:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            read = _fake(quantized, source) if source.name in note.reads else None
            scale = quantized.calibration.weights[node.name]
            layer = QuantizedLayer(module_of(gm, node), scale, note.weight, read, note.float_bias)
            written = _written(node)
            if kernels and written is not None:
                layer.writes = quantized.value_params(written)[0]
                layer.fixed_point = fixed_point
            gm.set_submodule(str(node.target), layer)
        elif note.inner and note.output is not None:
            gm.set_submodule(str(node.target), quantized.gated(before))
    if kernels:
        _add_integers(quantized, gm, by_name, fixed_point)
    made: dict[str, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if isinstance(_called(gm, node), QuantizedLayer):
            continue
        for name in annotation(node).reads if facts.INT8.known(node) else ():
            value = by_name[name]
            if moves_values(gm, value) and annotation(value).reads:
                continue  # what was moved is on the grid already
            if name not in made:
                target = f"int8_{name}"
                gm.add_submodule(target, _fake(quantized, value))
                with gm.graph.inserting_after(value):
                    made[name] = gm.graph.call_module(target, (value,))
                facts.inherit(made[name], value)
            node.replace_input_with(value, made[name])
    gm.recompile()
    return gm


def _add_integers(
    quantized: Quantized, gm: fx.GraphModule, by_name: dict[str, fx.Node], fixed_point: bool
) -> None:
    """Sums of two int8 values that are written in int8 are computed on integers; edits gm.

    With ``fixed_point`` so are products and average pools.
    """
    kinds: dict[Any, type[nn.Module]] = {operator.add: IntegerAdd}
    if fixed_point:
        kinds = {operator.add: FixedPointAdd, operator.mul: FixedPointMultiply}
        _average_integers(quantized, gm)
    for node in [n for n in gm.graph.nodes if n.op == "call_function" and n.target in kinds]:
        written, reads = _written(node), annotation(node).reads
        operands = [n.name for n in node.args if isinstance(n, fx.Node)]
        if written is None or len(operands) != 2 or set(operands) != set(reads):
            continue
        if any(written.name not in annotation(user).reads for user in written.users):
            continue  # computed in floats for the sake of a reader that takes them
        values = [by_name[name] for name in operands]
        if any(_spec(v).bits > 8 for v in (*values, written)):
            continue  # ONNX Runtime has no such kernel for 16 bits
        params = [quantized.value_params(v) for v in (*values, written)]
        target = f"integer_{node.name}"
        gm.add_submodule(target, kinds[node.target](*params))
        node.op, node.target = "call_module", target


def _average_integers(quantized: Quantized, gm: fx.GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_module"):
        pool = module_of(gm, node)
        if type(pool) is not nn.AvgPool2d or annotation(node).output is None or pool.ceil_mode:
            continue
        (source,) = node.all_input_nodes
        counts = pool.count_include_pad or pool.padding in (0, (0, 0))
        shared = annotation(source).range_of == annotation(node).range_of
        if counts and shared and pool.divisor_override is None:
            params = quantized.value_params(node)
            gm.set_submodule(str(node.target), FixedPointAverage(pool, *params))


def _written(node: fx.Node) -> fx.Node | None:
    """The int8 value that a layer's kernel writes: its own, or that behind a clip; None where it writes floats."""
    if annotation(node).output is not None:
        return node
    readers = list(node.users)
    if len(readers) != 1 or readers[0].op != "call_module":
        return None
    clip = node.graph.owning_module.get_submodule(str(readers[0].target))  # type: ignore[union-attr]
    clipped = type(clip) in CLIPS and annotation(readers[0]).output is not None
    return readers[0] if clipped else None


def _called(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module_of(gm, node) if node.op == "call_module" else None


def _fake(quantized: Quantized, value: fx.Node) -> FakeQuantize:
    low, high = quantized.calibration.values[annotation(value).range_of]
    return FakeQuantize(*_spec(value).params(low, high), _spec(value))


def _spec(value: fx.Node) -> QuantSpec:
    spec = annotation(value).output
    assert spec is not None, value.name
    return spec


def _exact_type(spec: QuantSpec, dtype: torch.dtype) -> torch.dtype:
    """The type that holds sums of a layer's products exactly: 24 bits of mantissa are too few behind 16-bit inputs."""
    return dtype if spec.bits <= 8 else torch.float64


def switches(sim: fx.GraphModule) -> dict[str, QuantizedLayer | FakeQuantize]:
    """The layers and values of a simulation that ``enabled`` can switch, by module path."""
    return {
        name: m for name, m in sim.named_modules() if isinstance(m, (QuantizedLayer, FakeQuantize))
    }
