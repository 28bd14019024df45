"""How one target represents tensors in int8, and the arithmetic of it.

A real value x is stored as q = clip(round(x / scale) + zero_point, qmin, qmax) and read back as
(q - zero_point) * scale, with ties rounded to even, as ONNX QuantizeLinear defines it.
Source: Jacob et al., 2018 (arXiv:1712.05877); Nagel et al., 2021 (arXiv:2106.08295).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace

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
    """

    bits: int = 8
    symmetric: bool = False
    signed: bool = False
    ch_axis: int | None = None

    @property
    def qmin(self) -> int:
        if not self.signed:
            return 0
        # symmetric int8 leaves -128 out, so that a weight and its negative are stored alike
        return -(2 ** (self.bits - 1)) + (1 if self.symmetric else 0)

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
class QuantScheme:
    """One named deployment target.

    Args:
        name: what ``target:`` in a config says.
        weights: of convolutions; ``linear_weights`` of linear layers.
        activations: of all other values.
        wide: of the values that a plan asks to be stored in 16 bits; None: the target has 8 bits
            alone.
        fuses: activation modules that the target's kernels compute inside the operation before
            them, so that no int8 value exists between the two.
        shared_at: operations whose inputs and output must have one range ("cat", "add", "pool").
    """

    name: str
    weights: QuantSpec
    linear_weights: QuantSpec
    activations: QuantSpec
    fuses: frozenset[type[nn.Module]]
    shared_at: frozenset[str] = field(default_factory=frozenset)
    # Not in repr: what was stored under the identity of a target without it keeps its name.
    wide: QuantSpec | None = field(default=None, repr=False)

    @property
    def identity(self) -> str:
        """All of it as text that is the same in every process: ``repr`` gives a set in an order that is not."""
        plain = replace(self, fuses=frozenset(), shared_at=frozenset())
        fused = sorted(f"{t.__module__}.{t.__qualname__}" for t in self.fuses)
        wide = "" if self.wide is None else f" {self.wide!r}"
        return f"{plain!r} {fused} {sorted(self.shared_at)}{wide}"


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
TARGETS: dict[str, QuantScheme] = {
    s.name: s
    for s in (
        _ONNXRUNTIME,
        # the same file on another runtime
        replace(_ONNXRUNTIME, name="openvino"),
        replace(_ONNXRUNTIME, name="per_tensor", weights=_PER_TENSOR),
        replace(
            _ONNXRUNTIME,
            name="tensorrt",
            linear_weights=_PER_CHANNEL,
            activations=QuantSpec(symmetric=True, signed=True),
            fuses=fused_on("tensorrt"),
        ),
        replace(
            _ONNXRUNTIME,
            name="tflite",
            activations=QuantSpec(signed=True),
            fuses=fused_on("tflite"),
            shared_at=frozenset({"cat", "pool"}),
        ),
        # as onnxruntime.quantization's get_qnn_qdq_config has it: uint8 values, single ones in
        # uint16 by tensor_quant_overrides, and no linear layer with a scale per channel
        replace(_ONNXRUNTIME, name="qnn", wide=QuantSpec(bits=16)),
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
    return (largest / spec.qmax).clamp_min(TINY).float()


def on_axis(scale: Tensor, weight: Tensor, axis: int | None) -> Tensor:
    """A (C,) scale shaped to broadcast along ``axis`` of ``weight``."""
    if scale.ndim == 0 or axis is None:
        return scale
    return scale.view([-1 if d == axis else 1 for d in range(weight.ndim)])


def quantize_weight(
    weight: Tensor, scale: Tensor, spec: QuantSpec, axis: int | None = None
) -> Tensor:
    """The tensor that is stored for ``weight``: int8, or int16 where the target has more bits."""
    q = torch.round(weight.detach() / on_axis(scale, weight, axis))
    return q.clamp(spec.qmin, spec.qmax).to(torch.int8 if spec.bits <= 8 else torch.int16)


def dequantized_weight(
    weight: Tensor, scale: Tensor, spec: QuantSpec, axis: int | None = None
) -> Tensor:
    """``weight`` as the int8 kernel sees it; straight-through gradient."""
    wide = on_axis(scale, weight, axis)
    q = (torch.round(weight / wide).clamp(spec.qmin, spec.qmax) * wide).detach()
    return weight + (q - weight.detach()) if weight.requires_grad else q


def fake_quantize(
    x: Tensor, scale: float, zero_point: int, spec: QuantSpec, out: Tensor | None = None
) -> Tensor:
    """``x`` rounded to what int8 can hold; the gradient passes inside the range alone.

    Args:
        x: any tensor.
        scale: of one step.
        zero_point: integer that stands for zero.
        spec: bits and sign.
        out: where to put the result when no gradient is asked for; None: into a new tensor.
    """
    if x.requires_grad:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, spec.qmin, spec.qmax)
    # torch's kernel multiplies by 1 / scale; runtimes divide, and the last bit decides ties
    # that later layers amplify
    q = (
        torch.div(x, scale, out=out)
        .round_()
        .clamp_(spec.qmin - zero_point, spec.qmax - zero_point)
    )
    return q.mul_(scale)
