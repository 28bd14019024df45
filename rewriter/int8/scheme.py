"""How one target represents tensors in int8, and the arithmetic of it.

A real value x is stored as q = clip(round(x / scale) + zero_point, qmin, qmax) and read back as
(q - zero_point) * scale, with ties rounded to even, as ONNX QuantizeLinear defines it.
Source: Jacob et al., 2018 (arXiv:1712.05877); Nagel et al., 2021 (arXiv:2106.08295).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import QuantizeError
from rewriter.graph.ops import CLIP_TYPES, fused_on

# The smallest scale: keeps a dead tensor from dividing by zero, far below any range that occurs.
TINY = 1e-12


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is stored.

    Args:
        bits: 8, or 16 where the target has it.
        symmetric: zero point at the middle (signed) or at the bottom; the range is then [-a, a].
        signed: int8 rather than uint8.
        ch_axis: the axis that has a scale for each entry; None: one scale for the tensor.
        full: a symmetric type that saturates at its own least value, -128, and not at -127.
        least_scale: smallest scale of a channel, as a share of the largest of the tensor.
        fixed: (scale, zero point) that a kernel prescribes whatever the range.
    """

    bits: int = 8
    symmetric: bool = False
    signed: bool = False
    ch_axis: int | None = None
    full: bool = False
    least_scale: float = 0.0
    fixed: tuple[float, int] | None = None

    @property
    def qmin(self) -> int:
        if not self.signed:
            return 0
        # symmetric int8 leaves -128 out, so that a weight and its negative are stored alike
        return -(2 ** (self.bits - 1)) + (1 if self.symmetric and not self.full else 0)

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    def params(self, low: float, high: float) -> tuple[float, int]:
        """Scale and zero point for values in [low, high]; zero is always representable.

        An affine zero point is a whole number, so the grid is stretched by up to half a step to
        reach both ends. Without that, normalised 8-bit pixels in [-1, 1] would all lie exactly
        between two steps, and engines that round the last bit otherwise would disagree on every
        one of them.
        """
        if self.fixed is not None:
            return self.fixed
        low, high = min(low, 0.0), max(high, 0.0)
        if self.symmetric:
            return _float32(max(-low, high) / self.qmax), 0
        span = self.qmax - self.qmin
        below = -low / max((high - low) / span, TINY)  # steps below zero; rounded down or up
        reaches = [
            _float32(_reach(low, high, n, span)) for n in (int(below), min(int(below) + 1, span))
        ]
        best = 0 if reaches[0] <= reaches[1] else 1
        return reaches[best], self.qmin + min(int(below) + best, span)


def _reach(low: float, high: float, below: int, span: int) -> float:
    """The scale with which ``below`` of ``span`` steps reach low, and the others high.

    An end that is less than half a step away may be cut off where no step is left for it.
    """
    cut = (high - low) / span / 2
    if (below == 0 and -low > cut) or (below == span and high > cut):
        return float("inf")
    return max(-low / below if below else 0.0, high / (span - below) if below < span else 0.0)


def _float32(scale: float) -> float:
    """What a runtime keeps of a scale."""
    return torch.tensor(max(scale, TINY), dtype=torch.float32, device="cpu").item()


@dataclass(frozen=True)
class FixedRange:
    """Scale and zero point that the kernels of a runtime prescribe for what an operation writes.

    Args:
        operation: its name, one of ``rewriter.int8.annotate.OPERATIONS``.
        scale: of one step.
        zero_point: integer that stands for zero.
        bits: of the value.
    """

    operation: str
    scale: float
    zero_point: int
    bits: int = 8


@dataclass(frozen=True)
class QuantScheme:
    """One named deployment target, and the limits of its kernels.

    Args:
        name: what ``target:`` in a config says.
        weights: of convolutions; ``linear_weights`` of linear layers.
        activations: of all other values.
        wide: of the values that a plan asks to be stored in 16 bits; None: the target has 8 bits
            alone.
        fuses: activation modules that the target's kernels compute inside the operation before
            them, so that no int8 value exists between the two.
        shared_at: operations whose inputs and output must have one range ("cat", "add", "pool", "resize").
        fixed_ranges: what the kernels prescribe for the output of an operation.
        inner_values: activations that take two kernels with an int8 value between them.
        computes: operations beyond those of every target that have an int8 kernel ("softmax").
        int8_only: what an int8 kernel writes exists in int8 alone: who wants floats reads it dequantized.
        float_bias: biases are added in float, not as int32.
        static_batch: the file is made for a batch of one size.
        fixed_point: kernels requantize by an int32 multiplier and a shift, not by a float.
    """

    name: str
    weights: QuantSpec
    linear_weights: QuantSpec
    activations: QuantSpec
    fuses: frozenset[type[nn.Module]]
    shared_at: frozenset[str] = field(default_factory=frozenset)
    # Not in repr: what was stored under the identity of a target without it keeps its name.
    wide: QuantSpec | None = field(default=None, repr=False)
    fixed_ranges: tuple[FixedRange, ...] = ()
    inner_values: frozenset[type[nn.Module]] = field(default_factory=frozenset)
    computes: frozenset[str] = field(default_factory=frozenset)
    int8_only: bool = False
    float_bias: bool = False
    static_batch: bool = False
    fixed_point: bool = False

    @property
    def least_weight_scale(self) -> float:
        """Smallest weight scale of a channel, as a share of the largest of its layer."""
        return self.weights.least_scale

    def fixed(self, operation: str, bits: int = 8) -> tuple[float, int] | None:
        """Scale and zero point of what an operation writes; None where calibration decides."""
        for entry in self.fixed_ranges:
            if (entry.operation, entry.bits) == (operation, bits):
                return entry.scale, entry.zero_point
        return None

    @property
    def identity(self) -> str:
        """All of it as text that is the same in every process: ``repr`` gives a set in an order that is not."""
        empty: frozenset[Any] = frozenset()
        plain = replace(self, fuses=empty, shared_at=empty, inner_values=empty, computes=empty)
        fused, inner = (
            sorted(f"{t.__module__}.{t.__qualname__}" for t in kinds)
            for kinds in (self.fuses, self.inner_values)
        )
        wide = "" if self.wide is None else f" {self.wide!r}"
        sets = f"{fused} {inner} {sorted(self.shared_at)} {sorted(self.computes)}"
        return f"{plain!r} {sets}{wide}"


# What saturation of the int8 output can carry out by itself. ONNX Runtime's kernels absorb only
# these: a convolution with another activation behind it and no int8 value in between would run in
# float, slower than the float network.
CLIPS = frozenset(CLIP_TYPES)
_PER_CHANNEL = QuantSpec(symmetric=True, signed=True, ch_axis=0)
_PER_TENSOR = QuantSpec(symmetric=True, signed=True)
_UINT8 = QuantSpec()

_ONNXRUNTIME = QuantScheme(
    "onnxruntime", _PER_CHANNEL, _PER_TENSOR, _UINT8, fused_on("onnxruntime")
)
_TENSORRT = replace(
    _ONNXRUNTIME,
    name="tensorrt",
    linear_weights=_PER_CHANNEL,
    # QuantizeLinear saturates at the bounds of int8, and no zero point moves them
    activations=QuantSpec(symmetric=True, signed=True, full=True),
    fuses=fused_on("tensorrt"),
    float_bias=True,  # its parser refuses DequantizeLinear of int32
)
# From LiteRT's kernels (Prepare of activations.cc, pooling.cc, concatenation.cc, resize_bilinear.cc), which refuse
# or requantize other scales. A hard sigmoid is no operator there; it gets the range of a sigmoid, whose upper end
# then clips it.
_TFLITE = replace(
    _ONNXRUNTIME,
    name="tflite",
    fuses=fused_on("tflite"),
    activations=QuantSpec(signed=True),
    shared_at=frozenset({"cat", "pool", "resize"}),
    fixed_ranges=(
        FixedRange("sigmoid", 1 / 256, -128),
        FixedRange("hardsigmoid", 1 / 256, -128),
        FixedRange("tanh", 1 / 128, 0),
        FixedRange("softmax", 1 / 256, -128),
        FixedRange("l2_norm", 1 / 128, 0),
    ),
    inner_values=frozenset({nn.SiLU}),  # LOGISTIC, then MUL
    computes=frozenset({"softmax"}),
    int8_only=True,
    static_batch=True,
    fixed_point=True,
)
# As onnxruntime.quantization's get_qnn_qdq_config has it: uint8 values, single ones in uint16 by
# tensor_quant_overrides with these two scales, and no linear layer with a scale per channel. What 8 bits fix, and
# the floor of the weight scales, is what the HTP emulator was seen to do.
_QNN = replace(
    _ONNXRUNTIME,
    name="qnn",
    fuses=fused_on("qnn"),
    weights=replace(_PER_CHANNEL, least_scale=1e-4),
    wide=QuantSpec(bits=16),
    fixed_ranges=(
        FixedRange("sigmoid", 1 / 256, 0),
        FixedRange("hardsigmoid", 1 / 256, 0),
        FixedRange("sigmoid", 2.0**-16, 0, bits=16),
        FixedRange("tanh", 2.0**-15, 2**15, bits=16),
    ),
    static_batch=True,
)
# A sum or a look-up, then a product of integers; in floats they take two to three times as long (see
# rewriter.int8.onnx.activations).
_GATED = frozenset({nn.SiLU, nn.Hardswish})
TARGETS: dict[str, QuantScheme] = {
    s.name: s
    for s in (
        replace(_ONNXRUNTIME, inner_values=_GATED),
        # the same file on another runtime
        replace(_ONNXRUNTIME, name="openvino"),
        replace(_ONNXRUNTIME, name="per_tensor", weights=_PER_TENSOR, inner_values=_GATED),
        _TENSORRT,
        _TFLITE,
        _QNN,
    )
}


def target(name: str) -> QuantScheme:
    """The deployment target called ``name``.

    Raises:
        QuantizeError: there is none; the message names the nearest.
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name, TARGETS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise QuantizeError(f"target: unknown: {name!r}{hint} (known: {', '.join(TARGETS)})")


def channel_axis(layer: nn.Module, spec: QuantSpec) -> int | None:
    """The axis of ``layer.weight`` with the output channels, None for one scale per tensor."""
    if spec.ch_axis is None:
        return None
    if isinstance(layer, nn.ConvTranspose2d):
        # (C_in, C_out / groups, ...): with groups one entry of axis 1 is several output channels
        return 1 if layer.groups == 1 else None
    return 0


def weight_scale(weight: Tensor, spec: QuantSpec, axis: int | None = None) -> Tensor:
    """The scale(s) that hold every weight: () or (C,), float32."""
    if axis is None:
        largest = weight.detach().abs().amax()
    else:
        rest = [d for d in range(weight.ndim) if d != axis]
        largest = weight.detach().abs().amax(dim=rest)
    scale = (largest / spec.qmax).clamp_min(TINY).float()
    # Qualcomm's kernels lose channels whose scales are many orders of magnitude below the largest
    return scale.clamp_min(spec.least_scale * float(scale.max())) if spec.least_scale else scale
