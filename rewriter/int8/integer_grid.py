"""The arithmetic of the integer grid, once: what a number becomes when it is stored, and what an int32 bias can hold.

A stored number is q = clamp(round(x / scale) + zero_point), ties to even, as ONNX QuantizeLinear defines it. Runtimes divide by the
scale; a product with its inverse decides ties otherwise, and later layers amplify the last bit. A bias is stored as int32 in steps of
(input scale x weight scale), which bounds the weight scale from below: a dead channel, with weights near zero and a bias that
is not, needs a coarser one (its weights are zero all the same).
Source: Jacob et al., 2018 (arXiv:1712.05877).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.int8.scheme import QuantSpec

# Steps of its bias that a layer may need: half of what an int32 holds.
MOST_BIAS_STEPS = 2.0**30
LARGEST_BIAS = 2**31 - 1
# Rounding passes four times over its data: in pieces of half a megabyte it does so inside the
# cache.
PIECE = 1 << 17


def ends(spec: QuantSpec, zero_point: int) -> tuple[int, int]:
    """The smallest and largest integer of a spec with the zero point taken off."""
    return spec.qmin - zero_point, spec.qmax - zero_point


def steps(x: Tensor, scale: Tensor | float) -> Tensor:
    """``x`` in whole steps, not clamped."""
    return torch.round(x / scale)


def on_grid(
    x: Tensor,
    scale: Tensor | float,
    low: float,
    high: float,
    out: Tensor | None = None,
) -> Tensor:
    """``scale`` times the whole number from low to high that is nearest to ``x / scale``; no gradient.

    Args:
        x: any tensor.
        scale: a number, or of a shape that broadcasts to that of ``x``.
        low: smallest integer, zero point taken off.
        high: largest integer, zero point taken off.
        out: where to put the result; None: into a new tensor.
    """
    return torch.div(x, scale, out=out).round_().clamp_(low, high).mul_(scale)


def on_axis(scale: Tensor, weight: Tensor, axis: int | None) -> Tensor:
    """A (C,) scale shaped to broadcast along ``axis`` of ``weight``."""
    if scale.ndim == 0 or axis is None:
        return scale
    return scale.view([-1 if d == axis else 1 for d in range(weight.ndim)])


def quantize_weight(
    weight: Tensor, scale: Tensor, spec: QuantSpec, axis: int | None = None
) -> Tensor:
    """The tensor that is stored for ``weight``: int8, or int16 where the target has more bits."""
    q = steps(weight.detach(), on_axis(scale, weight, axis))
    return q.clamp(spec.qmin, spec.qmax).to(torch.int8 if spec.bits <= 8 else torch.int16)


def dequantized_weight(
    weight: Tensor, scale: Tensor, spec: QuantSpec, axis: int | None = None
) -> Tensor:
    """``weight`` as the int8 kernel sees it; straight-through gradient."""
    wide = on_axis(scale, weight, axis)
    q = on_grid(weight.detach(), wide, spec.qmin, spec.qmax)
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
    return on_grid(x, scale, *ends(spec, zero_point), out)


def round_to_int8(
    x: Tensor, scale: float, zero_point: int, spec: QuantSpec, in_place: bool = False
) -> Tensor:
    """``fake_quantize`` without gradient: the same numbers, a few times as fast on CPU; in place where ``x`` allows it."""
    low, high = map(float, ends(spec, zero_point))
    if x.device.type != "cpu":
        return on_grid(x, scale, low, high)
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    result = x if in_place else torch.empty_like(x)
    if x.numel() <= PIECE:
        return on_grid(x, scale, low, high, result)
    size = (x.numel(),)
    pieces = zip(
        x.as_strided(size, (1,)).split(PIECE),
        result.as_strided(size, (1,)).split(PIECE),
        strict=True,
    )
    for source, piece in pieces:
        on_grid(source, scale, low, high, piece)
    return result


def bias_steps(bias: Tensor, step: Tensor) -> Tensor:
    """The int32 numbers that stand for a bias, in float64; ``step`` is input scale x weight scale."""
    return steps(bias.detach().double(), step.double())


def rounded_bias(bias: Tensor, step: Tensor) -> Tensor:
    """The bias as int32 holds it, in its own type; no gradient."""
    return (steps(bias.detach(), step) * step).to(bias.dtype)


def least_weight_scale(bias: Tensor, input_step: float, per_channel: bool) -> Tensor:
    """The weight scale below which an int32 bias overflows, with a factor 2 to spare: (C,), or () for one scale."""
    size = bias.detach().abs()
    return (size if per_channel else size.amax()) / (input_step * MOST_BIAS_STEPS)
