"""How pools and resizing are written in ONNX."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.int8.onnx.arguments import pad, source_of
from rewriter.int8.onnx.builder import Emission, UnsupportedError, Value


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _windows(node: fx.Node, m: Any) -> tuple[list[int], ...]:
    """Kernel, stride, begin and end pads of a pool; the end pads make room for ``ceil_mode``."""
    kernel, padding = _pair(m.kernel_size), _pair(m.padding)
    stride = _pair(m.stride if m.stride is not None else m.kernel_size)
    dilation = _pair(getattr(m, "dilation", 1))
    end: list[int] = []
    for i in range(2):
        size, out = facts.SHAPE.of(source_of(node))[-2 + i], facts.SHAPE.of(node)[-2 + i]
        reach = (out - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        end.append(max(reach - size - padding[i], padding[i] if not m.ceil_mode else 0))
    return list(kernel), list(stride), list(padding), end


def max_pool(e: Emission, node: fx.Node, m: nn.MaxPool2d) -> Value:
    if m.return_indices:
        raise UnsupportedError("indices of a max pool")
    kernel, stride, begin, end = _windows(node, m)
    return e.op(
        "MaxPool",
        e.read(source_of(node), node),
        kernel_shape=kernel,
        strides=stride,
        pads=begin + end,
        dilations=list(_pair(m.dilation)),
    )


def average_pool(e: Emission, node: fx.Node, m: nn.AvgPool2d) -> Value:
    if m.divisor_override is not None:
        raise UnsupportedError("divisor_override of an average pool")
    kernel, stride, begin, end = _windows(node, m)
    x = e.read(source_of(node), node)
    include = bool(m.count_include_pad) and any(begin)
    if include and begin != end:
        # the user's padding counts, what ceil_mode adds behind it does not
        x = pad(e, x, [0, 0, *begin, 0, 0, *begin])
        end = [max(a - b, 0) for a, b in zip(end, begin, strict=True)]
        begin, include = [0, 0], False
    return e.op(
        "AveragePool",
        x,
        kernel_shape=kernel,
        strides=stride,
        pads=begin + end,
        count_include_pad=int(include),
    )


def adaptive_pool(e: Emission, node: fx.Node, m: Any) -> Value:
    x, average = e.read(source_of(node), node), isinstance(m, nn.AdaptiveAvgPool2d)
    sizes, outs = facts.SHAPE.of(source_of(node))[-2:], facts.SHAPE.of(node)[-2:]
    if average and tuple(outs) == (1, 1):
        return e.op("GlobalAveragePool", x)
    if all(s % o == 0 for s, o in zip(sizes, outs, strict=True)):
        steps = [s // o for s, o in zip(sizes, outs, strict=True)]
        kind = "AveragePool" if average else "MaxPool"
        return e.op(kind, x, kernel_shape=steps, strides=steps)
    if not average:
        raise UnsupportedError("adaptive max pool to a size that does not divide its input")
    # uneven windows: the average over rows and over columns are two matrix products
    rows, columns = (_window_means(s, o) for s, o in zip(sizes, outs, strict=True))
    return e.op(
        "MatMul", e.op("MatMul", e.constant(rows, "rows"), x), e.constant(columns.t(), "columns")
    )


def _window_means(size: int, out: int) -> Tensor:
    """(out, size) matrix that averages over torch's adaptive windows."""
    matrix = torch.zeros(out, size)
    for i in range(out):
        start, stop = i * size // out, math.ceil((i + 1) * size / out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


_RESIZE_MODES = {"nearest": "nearest", "nearest-exact": "nearest"} | dict.fromkeys(
    ("linear", "bilinear", "trilinear"), "linear"
)


def upsample(e: Emission, node: fx.Node, m: nn.Upsample) -> Value:
    mode = m.mode
    if mode != "bicubic" and mode not in _RESIZE_MODES:
        raise UnsupportedError(f"resizing by {mode}")
    sizes, outs = facts.SHAPE.of(source_of(node))[2:], facts.SHAPE.of(node)[2:]
    attributes: dict[str, Any] = {"mode": _RESIZE_MODES.get(mode, "cubic")}
    if mode == "nearest":
        attributes |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    elif mode == "nearest-exact":
        attributes["nearest_mode"] = "round_prefer_ceil"
    elif m.align_corners:
        attributes["coordinate_transformation_mode"] = "align_corners"
    if mode == "bicubic":
        attributes["cubic_coeff_a"] = -0.75
    x = e.read(source_of(node), node)
    factor = m.scale_factor
    if factor is not None and not m.recompute_scale_factor:
        factors = list(factor) if isinstance(factor, tuple) else [factor] * len(sizes)
    elif all(o % s == 0 for s, o in zip(sizes, outs, strict=True)):
        factors = [o / s for s, o in zip(sizes, outs, strict=True)]
    else:
        factors = [_factor(s, o) for s, o in zip(sizes, outs, strict=True)]
    if mode in ("nearest", "nearest-exact") and any(f != int(f) for f in factors):
        return _picked(e, node, m, x)
    if mode == "bicubic" and min(factors) < 1:
        return _resize_by_products(e, node, m, x)
    scales = e.constant(np.array([1, 1, *factors], dtype=np.float32), "scales")
    return e.op("Resize", x, "", scales, **attributes)


def _factor(size: int, out: int) -> float:
    """The float32 nearest to out / size with which a runtime, which rounds down, comes to ``out``.

    ONNX Runtime's last optimization level permutes the sizes of a Resize that names its axes, and then refuses the graph.
    """
    factor = np.float32(out / size)
    # its shape inference multiplies in double precision, its kernel in single
    while min(int(factor * np.float32(size)), int(float(factor) * size)) < out:
        factor = np.nextafter(factor, np.float32(np.inf))
    return float(factor)


def _picked(e: Emission, node: fx.Node, m: nn.Upsample, x: str) -> Value:
    """The nearest rows, then the nearest columns: where a runtime rounds a quotient, it picks others than torch here and there."""
    sizes, outs = source_of(node).meta["shape"][2:], node.meta["shape"][2:]
    if len(sizes) != 2:
        raise UnsupportedError("resizing of other than two dimensions to the nearest value")
    for axis in range(2):
        index = _resizing(sizes[axis], outs[axis], m, axis).argmax(1)
        x = e.op("Gather", x, e.constant(index, "index"), axis=2 + axis)
        if axis == 0:
            x = e.rounded(x, node)  # each of the two is one operation on int8 values
    return x


def _resize_by_products(e: Emission, node: fx.Node, m: nn.Upsample, x: str) -> Value:
    """A resize is linear in rows and in columns: two matrix products, where ONNX Runtime's kernel does not shrink."""
    sizes, outs = facts.SHAPE.of(source_of(node))[2:], facts.SHAPE.of(node)[2:]
    if len(sizes) != 2:
        raise UnsupportedError("cubic resizing of other than two dimensions")
    rows, columns = (_resizing(sizes[i], outs[i], m, i) for i in range(2))
    return e.op(
        "MatMul", e.op("MatMul", e.constant(rows, "rows"), x), e.constant(columns.t(), "columns")
    )


def _resizing(size: int, out: int, m: nn.Upsample, axis: int) -> Tensor:
    """(out, size) matrix that resizes one dimension as torch does."""
    one = torch.eye(size).view(1, 1, size, size)
    if m.scale_factor is not None and not m.recompute_scale_factor:
        factor: Any = m.scale_factor[axis] if isinstance(m.scale_factor, tuple) else m.scale_factor
        made = nn.functional.interpolate(
            one, scale_factor=(factor, 1.0), mode=m.mode, align_corners=m.align_corners
        )
    else:
        made = nn.functional.interpolate(
            one, size=(out, size), mode=m.mode, align_corners=m.align_corners
        )
    return made[0, 0].contiguous()
