"""Requantization by an int32 multiplier and a shift, as integer-only kernels do it.

A real factor is m 2^shift with m in [1/2, 1) held in 31 bits. A whole number is multiplied by it in two rounded steps:
the high half of the doubled product, then a division by a power of two.
Source: Jacob et al., 2018 (arXiv:1712.05877), section 2.2; gemmlowp's fixedpoint.h; LiteRT's reference kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter.int8.integer_grid import steps

_LEFT = 20  # bits by which a sum shifts its inputs before it scales them


def multiplier(factor: float) -> tuple[int, int]:
    """The 31-bit multiplier and the shift of a positive factor."""
    if factor == 0:
        return 0, 0
    fraction, shift = math.frexp(factor)
    m = round(fraction * 2**31)
    if m == 2**31:
        m, shift = m // 2, shift + 1
    return (0, 0) if shift < -31 else (m, shift)


def multiply(x: Tensor, m: Tensor, shift: Tensor) -> Tensor:
    """Whole numbers times a factor, as gemmlowp rounds them.

    Args:
        x: int64, within int32.
        m: int64 multipliers that broadcast with x.
        shift: int64, likewise.
    """
    product = (x << shift.clamp_min(0)) * m
    nudge = torch.where(product >= 0, 2**30, 1 - 2**30)
    high = torch.div(product + nudge, 2**31, rounding_mode="trunc")
    right = (-shift).clamp_min(0)
    mask = (torch.ones_like(right) << right) - 1
    rest = high & mask
    threshold = (mask >> 1) + (high < 0).long()
    return (high >> right) + (rest > threshold).long()


def scaled(x: Tensor, factors: Tensor) -> Tensor:
    """``multiply`` by real factors, each as its own multiplier and shift; x holds whole numbers of any type.

    Args:
        x: whole numbers.
        factors: () or a shape that broadcasts with x.
    """
    pairs = [multiplier(float(f)) for f in factors.double().flatten()]
    m, shift = (
        torch.tensor(v, device=x.device).view(factors.shape) for v in zip(*pairs, strict=True)
    )
    return multiply(x.long(), m, shift)


class FixedPointAdd(nn.Module):
    """The sum of two int8 values: both brought to one fine scale, added, brought to the output's."""

    def __init__(self, *params: tuple[float, int]) -> None:
        super().__init__()
        (a, _), (b, _), (out, _) = params
        largest = 2 * max(a, b)
        self.steps, self.out = (a, b), out
        self.factors = (a / largest, b / largest, largest / (2.0**_LEFT * out))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total: Tensor | int = 0
        for value, step, factor in zip((x, y), self.steps, self.factors, strict=False):
            whole = steps(value, step).long() << _LEFT
            total = total + scaled(whole, torch.tensor(factor))
        q = scaled(torch.as_tensor(total), torch.tensor(self.factors[2]))
        return (q * self.out).to(x.dtype)


class FixedPointMultiply(nn.Module):
    """The product of two int8 values, requantized once."""

    def __init__(self, *params: tuple[float, int]) -> None:
        super().__init__()
        (a, _), (b, _), (out, _) = params
        self.steps, self.out, self.factor = (a, b), out, a * b / out

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        whole = steps(x, self.steps[0]) * steps(y, self.steps[1])
        return (scaled(whole, torch.tensor(self.factor)) * self.out).to(x.dtype)


class FixedPointAverage(nn.Module):
    """An average pool over stored integers, rounded half away from zero."""

    def __init__(self, pool: nn.AvgPool2d, scale: float, zero_point: int) -> None:
        super().__init__()
        self.pool, self.scale, self.zero_point = pool, scale, zero_point
        kernel = pool.kernel_size
        self.count = kernel * kernel if isinstance(kernel, int) else kernel[0] * kernel[1]

    def forward(self, x: Tensor) -> Tensor:
        p, count = self.pool, self.count
        whole = steps(x, self.scale)
        mean = functional.avg_pool2d(whole, p.kernel_size, p.stride, p.padding, p.ceil_mode, True)
        total = torch.round(mean * count).long() + self.zero_point * count
        half = torch.where(total > 0, count // 2, -(count // 2))
        q = torch.div(total + half, count, rounding_mode="trunc") - self.zero_point
        return (q * self.scale).to(x.dtype)
