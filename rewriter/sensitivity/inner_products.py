"""Inner products of a gradient with the error that rounding makes, sample by sample.

They are what screening spends most of its time on beside the passes themselves, and each is bound
by memory: nothing as large as a value is written where a buffer inside the cache will do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter.int8.integer_grid import PIECE, round_to_int8
from rewriter.int8.scheme import QuantSpec
from rewriter.sensitivity.shared_prefix import with_weight


def dot(a: Tensor, b: Tensor, samples: int) -> Tensor:
    """(samples,) float64 inner product of each sample's part of two values."""
    if a.shape[0] % samples:
        # the batch is not the first dimension: only the sum is known, and samples with independent
        # signs share it alike
        return ((a * b).sum().double() / samples**0.5).expand(samples).cpu()
    return _row_dots(_rows(a, samples, b), _rows(b, samples)).double().cpu()


def rounding_dot(
    gradient: Tensor, x: Tensor, params: tuple[float, int, QuantSpec], samples: int
) -> Tensor:
    """(samples,) float64 inner product of a gradient with the rounding error of ``x``."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[0] % samples:
        return dot(gradient, round_to_int8(x, *params) - x, samples)
    scale, zero_point, spec = params
    low, high = float(spec.qmin - zero_point), float(spec.qmax - zero_point)
    g, x = _rows(gradient, samples, x).to(x.dtype), _rows(x, samples)
    step = max(1, PIECE // max(x.shape[1], 1))
    steps, error = torch.empty(2, PIECE).unbind()
    found: list[Tensor] = []
    for gs, xs in zip(g.split(step), x.split(step), strict=True):
        if len(xs) > 1:
            a, e = (t[: xs.numel()].view(xs.shape) for t in (steps, error))
            found += _row_dots(gs, _steps_off(xs, scale, low, high, a, e)).unbind()
            continue
        sums = [
            torch.dot(gp, _steps_off(xp, scale, low, high, steps[: len(xp)], error[: len(xp)]))
            for gp, xp in zip(gs[0].split(PIECE), xs[0].split(PIECE), strict=True)
        ]
        found.append(torch.stack(sums).sum())
    return torch.stack(found).double().mul_(scale)


def _steps_off(
    x: Tensor, scale: float, low: float, high: float, steps: Tensor, error: Tensor
) -> Tensor:
    """The rounding error of ``x`` in steps of the grid; both buffers are overwritten."""
    torch.mul(x, 1 / scale, out=steps)
    return torch.round(steps, out=error).clamp_(low, high).sub_(steps)


def weight_dot(
    gradient: Tensor, x: Tensor, layer: Any, weight: Tensor, bias: Tensor | None, samples: int
) -> Tensor:
    """(samples,) float64 inner product of a gradient with ``layer`` on a change of its weight.

    Args:
        gradient: of the layer's result.
        x: what the layer reads.
        layer: a module with weight and bias.
        weight: change of its weight.
        bias: change of its bias.
        samples: in the batch.
    """
    if _sums_products(layer, x, gradient, samples):
        # <g, W x> = <W, sum over places of g x^T>: the smaller result of the two
        g, seen = _places(gradient, samples), _places(x, samples)
        change = weight.reshape(weight.shape[0], -1)
        found = _row_dots(
            torch.bmm(g.transpose(1, 2), seen).flatten(1),
            change.flatten().expand(samples, -1),
        ).double()
        if bias is not None:
            ones = g.new_ones(g.shape[1])
            sums = torch.stack([torch.mv(row.t(), ones) for row in g])
            found += torch.mv(sums, bias).double()
        return found.cpu()
    with torch.no_grad():
        return dot(gradient, with_weight(layer, weight, bias)(x), samples)


def _sums_products(layer: Any, x: Tensor, gradient: Tensor, samples: int) -> bool:
    """A 1x1 convolution without stride whose map has more places than it has input channels."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.padding in ((0, 0), "valid", "same")
        and layer.groups == 1
        and x.shape[0] % samples == 0
        and x.device.type == "cpu"
        and x.shape[2] * x.shape[3] > x.shape[1]
        and gradient.dtype == x.dtype
    )


def _places(x: Tensor, samples: int) -> Tensor:
    """(N, C, H, W) as (N, H x W, C)."""
    return x.permute(0, 2, 3, 1).reshape(samples, -1, x.shape[1])


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """(N,) inner products of the rows of two matrices."""
    if a.device.type != "cpu":
        return torch.linalg.vecdot(a, b)
    if a.dtype != b.dtype:
        a, b = a.double(), b.double()
    # one call for all rows writes their products first, and takes twice as long
    return torch.stack([torch.dot(p, q) for p, q in zip(a, b, strict=True)])


def _rows(x: Tensor, samples: int, like: Tensor | None = None) -> Tensor:
    """(samples, elements) in the memory order of ``like``."""
    like = x if like is None else like
    if x.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(samples, -1)


class _Clipped(torch.autograd.Function):
    """A clamp in place that keeps its result alone for the way back; torch's own keeps a copy of its input too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.bounds = low, high
        functional.hardtanh_(x, low, high)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], y, *ctx.bounds), None, None


def clipped(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` between two bounds, written over ``x``, differentiable."""
    return _Clipped.apply(x, low, high)  # type: ignore[no-any-return]
