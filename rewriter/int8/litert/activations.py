"""How activations, pools, pads and resizing are written for LiteRT.

What has no int8 kernel there is computed in float between DEQUANTIZE and QUANTIZE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from rewriter.int8.annotate import annotation, is_mean
from rewriter.int8.litert.builder import (
    ACTIVATION,
    Emission,
    UnsupportedError,
    Value,
    clip_bounds,
    shape_of,
    source_of,
    stored,
)
from rewriter.int8.litert.layers import VALID, Emitter, pad, padding_of
from rewriter.int8.litert.writer import Array, Grid, options

# What the depthwise convolution that stands for a hard sigmoid multiplies by, in steps of its weight scale.
_SIXTH = 127


def written(e: Emission, node: fx.Node, x: Value) -> tuple[float, int] | None:
    """Scale and zero point of what an operation writes that read ``x``; None: floats."""
    if x.params is None or annotation(node).output is None:
        return None
    return e.params(node)


def unary(code: str, kind: str | None = None, **settings: Callable[[Any], Any]) -> Emitter:
    """An operator with an int8 kernel that reads and writes one value of the same shape."""

    def emit(e: Emission, node: fx.Node, m: Any) -> None:
        x = e.read(source_of(node), node)
        params = written(e, node, x)
        if x.params is not None and params is None:
            x = e.dequantize(x)
        opts = options(kind, **{k: of(m) for k, of in settings.items()}) if kind else None
        e.set(node, e.op(code, [x], x.shape, params, opts))

    return emit


def in_float(compute: Callable[[Emission, Value, Any], Value]) -> Emitter:
    """An activation of float operators; its int8 form is made by whoever reads one."""

    def emit(e: Emission, node: fx.Node, m: Any) -> None:
        e.set(node, compute(e, e.read_float(source_of(node), node), m))

    return emit


def binary(e: Emission, code: str, kind: str, x: Value, y: Value) -> Value:
    """A float operator of two values of one shape (or a scalar)."""
    return e.op(code, [x, y], x.shape, None, options(kind))


def plain(e: Emission, code: str, x: Value, kind: str | None = None) -> Value:
    """A float operator of one value."""
    return e.op(code, [x], x.shape, None, options(kind) if kind else None)


def _clip(e: Emission, node: fx.Node, m: nn.Module) -> None:
    if node in e.done:
        return
    x = e.read(source_of(node), node)
    low, high = clip_bounds(m)
    code = {(0.0, float("inf")): "RELU", (0.0, 6.0): "RELU6"}.get((low, high))
    params = written(e, node, x)
    if x.params is not None and params is not None and code is None:
        # on the grid of the output, whose type cuts what the bounds leave
        e.set(node, e.clipped(e.quantize(x, params), low, high))
        return
    if x.params is not None and params is None:
        x = e.dequantize(x)
    if code is not None:
        e.set(node, e.op(code, [x], x.shape, params))
        return
    e.set(node, float_clip(e, x, low, high))


def float_clip(e: Emission, x: Value, low: float, high: float) -> Value:
    """A float value cut to bounds."""
    for code, bound in (("MAXIMUM", low), ("MINIMUM", high)):
        if abs(bound) != float("inf"):
            x = binary(e, code, "MaximumMinimum", x, e.scalar(bound))
    return x


def _prelu(e: Emission, node: fx.Node, m: nn.PReLU) -> None:
    slope = m.weight.detach()
    if slope.numel() == 1:
        unary("LEAKY_RELU", "LeakyRelu", alpha=lambda _: float(slope))(e, node, m)
        return
    x = e.read(source_of(node), node)
    params = written(e, node, x)
    if params is None and x.params is not None:
        x = e.dequantize(x)
    if len(x.shape) not in (2, 4):
        raise UnsupportedError("PReLU of a value with neither 2 nor 4 dimensions")
    shape = (1, 1, -1) if len(x.shape) == 4 else (-1,)
    values: Array = slope.reshape(shape).numpy()
    if params is None:
        a = e.w.constant(f"{e.place}.slope", values)
    else:
        scale = max(float(np.abs(values).max()) / 127, 1e-12)
        q = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
        a = e.w.constant(f"{e.place}.slope", q, Grid(np.float32(scale)))  # type: ignore[arg-type]
    e.set(node, e.op("PRELU", [x, a], x.shape, params))


def _silu(e: Emission, node: fx.Node, m: nn.SiLU) -> None:
    del m
    x = e.read(source_of(node), node)
    params, inner = written(e, node, x), None
    if params is not None and annotation(node).inner:
        inner = e.quantized.gate_params(node)
    else:
        params = None
        x = x if x.params is None else e.dequantize(x)
    gate = e.op("LOGISTIC", [x], x.shape, inner)
    e.set(node, e.op("MUL", [x, gate], x.shape, params, options("Mul")))


def _hard_sigmoid(e: Emission, node: fx.Node, m: nn.Hardsigmoid) -> None:
    """A 1x1 depthwise convolution with weight 1/6 and bias 1/2, cut by the ends of its range."""
    del m
    x = e.read(source_of(node), node)
    params = written(e, node, x)
    if params is None or len(x.shape) != 4:
        x = x if x.params is None else e.dequantize(x)
        y = binary(e, "MUL", "Mul", x, e.scalar(1 / 6))
        y = binary(e, "ADD", "Add", y, e.scalar(0.5))
        e.set(node, float_clip(e, y, 0.0, 1.0))
        return
    assert x.params is not None
    channels, scale = x.shape[1], np.float32(1 / 6 / _SIXTH)
    weight = np.full((1, 1, 1, channels), _SIXTH, np.int8)
    scales: Array = np.full(channels, scale, np.float32)
    w = e.w.constant(f"{e.place}.sixth", weight, Grid(scales, 0, 3))
    step = scales * np.float32(x.params[0])
    bias = np.rint(0.5 / step.astype(np.float64)).astype(np.int32)
    b = e.w.constant(f"{e.place}.half", bias, Grid(step, 0, 0))
    opts = options("DepthwiseConv2D", padding=VALID, strideH=1, strideW=1, depthMultiplier=1)
    made = e.op("DEPTHWISE_CONV_2D", [x, w, b], x.shape, params, opts)
    e.set(node, e.clipped(made, 0.0, 1.0))


def _softplus(e: Emission, x: Value, m: Any) -> Value:
    """max(b x, 0) + log(1 + exp(-|b x|)), divided by b: no overflow."""
    beta = float(getattr(m, "beta", 1.0))
    x = x if beta == 1 else binary(e, "MUL", "Mul", x, e.scalar(beta))
    small = plain(e, "EXP", plain(e, "NEG", plain(e, "ABS", x, "Abs"), "Neg"), "Exp")
    log = plain(e, "LOG", binary(e, "ADD", "Add", small, e.scalar(1.0)))
    y = binary(e, "ADD", "Add", plain(e, "RELU", x), log)
    return y if beta == 1 else binary(e, "MUL", "Mul", y, e.scalar(1 / beta))


def _mish(e: Emission, x: Value, m: Any) -> Value:
    del m
    return binary(e, "MUL", "Mul", x, plain(e, "TANH", _softplus(e, x, None)))


def _elu(e: Emission, node: fx.Node, m: nn.ELU) -> None:
    if m.alpha == 1:
        unary("ELU")(e, node, m)
        return
    x = e.read_float(source_of(node), node)
    below = binary(
        e,
        "MUL",
        "Mul",
        plain(e, "ELU", float_clip(e, x, float("-inf"), 0.0)),
        e.scalar(float(m.alpha)),
    )
    e.set(node, binary(e, "ADD", "Add", plain(e, "RELU", x), below))


def softmax(e: Emission, node: fx.Node, dim: int) -> None:
    """SOFTMAX over the last axis, to which another one is moved."""
    x = e.in_torch_order(e.read(source_of(node), node))
    params, shape = written(e, node, x), x.shape
    if params is None and x.params is not None:
        x = e.in_torch_order(e.dequantize(e.read(source_of(node), node)))
    order = [d for d in range(len(shape)) if d != dim % len(shape)] + [dim % len(shape)]
    moved = transpose_plain(e, x, order)
    made = e.plain(moved.shape, params)
    e.w.op("SOFTMAX", [moved.index], [made.index], options("Softmax", beta=1.0))
    back = [order.index(d) for d in range(len(shape))]
    e.set(node, e.laid_out(transpose_plain(e, made, back), shape))


def transpose_plain(e: Emission, x: Value, order: list[int]) -> Value:
    """TRANSPOSE of a value that lies as torch has it."""
    if order == sorted(order):
        return x
    made = e.plain([x.shape[d] for d in order], x.params)
    e.w.op("TRANSPOSE", [x.index, e.ints(order)], [made.index], options("Transpose"))
    return made


def _softmax(e: Emission, node: fx.Node, m: nn.Softmax) -> None:
    dim = m.dim
    if dim is None:  # torch's own rule for a missing dimension
        dim = 0 if len(shape_of(node)) in (0, 1, 3) else 1
    softmax(e, node, dim)


# ------------------------------------------------------------------------- pooling and resizing


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _pooled(
    e: Emission,
    node: fx.Node,
    code: str,
    x: Value,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    begin: tuple[int, int],
    fill: float,
) -> None:
    _, _, height, width = shape_of(node)
    x, padding = padding_of(e, x, (height, width), (kernel, stride, (1, 1)), begin, fill)
    opts = options(
        "Pool2D",
        padding=padding,
        strideH=stride[0],
        strideW=stride[1],
        filterHeight=kernel[0],
        filterWidth=kernel[1],
        fusedActivationFunction=ACTIVATION["none"],
    )
    e.set(node, e.op(code, [x], shape_of(node), x.params, opts))


def _max_pool(e: Emission, node: fx.Node, m: nn.MaxPool2d) -> None:
    if m.return_indices or _pair(m.dilation) != (1, 1):
        raise UnsupportedError("a max pool with indices or dilation")
    kernel, stride = _pair(m.kernel_size), _pair(m.stride or m.kernel_size)
    x = e.read(source_of(node), node)
    _pooled(e, node, "MAX_POOL_2D", x, kernel, stride, _pair(m.padding), float("-inf"))


def _average_pool(e: Emission, node: fx.Node, m: nn.AvgPool2d) -> None:
    if is_mean(e.gm, node):
        _mean_pool(e, node)
        return
    if m.divisor_override is not None or m.ceil_mode:
        raise UnsupportedError("an average pool with divisor_override or ceil_mode")
    kernel, stride, begin = (
        _pair(m.kernel_size),
        _pair(m.stride or m.kernel_size),
        _pair(m.padding),
    )
    x = e.read(source_of(node), node)
    if m.count_include_pad and any(begin):
        x = pad(e, x, (begin[1], begin[1], begin[0], begin[0]))
        begin = (0, 0)
        _, _, height, width = shape_of(node)
        # what no window reaches is cut off, or SAME would be chosen and count otherwise
        used = [(o - 1) * s + k for o, s, k in zip((height, width), stride, kernel, strict=True)]
        x = _cut(e, x, used[0], used[1])
    elif any(begin) and not _is_same(node, kernel, stride, begin):
        raise UnsupportedError("an average pool whose padding does not count")
    _pooled(e, node, "AVERAGE_POOL_2D", x, kernel, stride, begin, 0.0)


def _is_same(
    node: fx.Node, kernel: tuple[int, int], stride: tuple[int, int], begin: tuple[int, int]
) -> bool:
    """Whether SAME pads as torch does."""
    sizes, out = shape_of(source_of(node))[2:], shape_of(node)[2:]
    return all(
        o == -(-n // s) and max((o - 1) * s + k - n, 0) // 2 == b
        for n, o, s, k, b in zip(sizes, out, stride, kernel, begin, strict=True)
    )


def _cut(e: Emission, x: Value, height: int, width: int) -> Value:
    n, c, *sizes = x.shape
    if sizes == [height, width]:
        return x
    ends = e.ints([n, height, width, c])
    parts = [x, e.ints([0] * 4), ends, e.ints([1] * 4)]
    return e.op("STRIDED_SLICE", parts, (n, c, height, width), x.params, options("StridedSlice"))


def _mean_pool(e: Emission, node: fx.Node) -> None:
    x = e.read(source_of(node), node)
    params = written(e, node, x)
    if params is None and x.params is not None:
        x = e.dequantize(x)
    opts = options("Reducer", keepDims=True)
    e.set(node, e.op("MEAN", [x, e.ints([1, 2])], shape_of(node), params, opts))


def _adaptive_pool(e: Emission, node: fx.Node, m: Any) -> None:
    average = isinstance(m, nn.AdaptiveAvgPool2d)
    if average and is_mean(e.gm, node):
        _mean_pool(e, node)
        return
    sizes, outs = shape_of(source_of(node))[-2:], shape_of(node)[-2:]
    if any(s % o for s, o in zip(sizes, outs, strict=True)):
        raise UnsupportedError("an adaptive pool to a size that does not divide its input")
    steps = (sizes[0] // outs[0], sizes[1] // outs[1])
    x = e.read(source_of(node), node)
    code = "AVERAGE_POOL_2D" if average else "MAX_POOL_2D"
    _pooled(e, node, code, x, steps, steps, (0, 0), 0.0)


def _upsample(e: Emission, node: fx.Node, m: nn.Upsample) -> None:
    x, shape = e.read(source_of(node), node), shape_of(node)
    if m.mode not in ("nearest", "nearest-exact", "bilinear") or len(shape) != 4:
        raise UnsupportedError(f"resizing by {m.mode}")
    factor = m.scale_factor
    if factor is not None and not m.recompute_scale_factor:
        factors: Any = factor if isinstance(factor, tuple) else (factor, factor)
        if any(n * f != o for n, o, f in zip(x.shape[2:], shape[2:], factors, strict=True)):
            raise UnsupportedError("resizing by a factor that gives no whole size")
    corners = bool(m.align_corners)
    if m.mode == "bilinear":
        opts = options("ResizeBilinear", alignCorners=corners, halfPixelCenters=not corners)
        code = "RESIZE_BILINEAR"
    else:
        exact = m.mode == "nearest-exact"
        opts = options("ResizeNearestNeighbor", alignCorners=False, halfPixelCenters=exact)
        code = "RESIZE_NEAREST_NEIGHBOR"
    e.set(node, e.op(code, [x, e.ints(shape[2:])], shape, x.params, opts))


def _zero_pad(e: Emission, node: fx.Node, m: nn.ZeroPad2d) -> None:
    left, right, top, bottom = m.padding
    x = e.read(source_of(node), node)
    if len(x.shape) != 4:
        raise UnsupportedError("padding a value without four dimensions")
    if min(m.padding) < 0:
        raise UnsupportedError("padding by less than nothing")
    e.set(node, pad(e, x, (left, right, top, bottom)))


def _batch_norm(e: Emission, node: fx.Node, m: Any) -> None:
    if m.running_mean is None:
        raise UnsupportedError("batch norm without running statistics")
    x = e.read_float(source_of(node), node)
    gain = torch.rsqrt(m.running_var + m.eps) * (1.0 if m.weight is None else m.weight)
    shift = (0.0 if m.bias is None else m.bias) - m.running_mean * gain
    sizes = (1, -1, *[1] * (len(x.shape) - 2))
    y = x
    for code, kind, value in (("MUL", "Mul", gain), ("ADD", "Add", shift)):
        c = e.w.constant(f"{e.place}.{kind}", stored(value.detach().reshape(sizes)))
        y = e.op(code, [y, c], x.shape, None, options(kind))
    e.set(node, y)


MODULES: dict[type[nn.Module], Emitter] = {
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: _clip,
    nn.ReLU6: _clip,
    nn.Hardtanh: _clip,
    nn.LeakyReLU: unary("LEAKY_RELU", "LeakyRelu", alpha=lambda m: m.negative_slope),
    nn.PReLU: _prelu,
    nn.SiLU: _silu,
    nn.Hardswish: unary("HARD_SWISH", "HardSwish"),
    nn.Hardsigmoid: _hard_sigmoid,
    nn.Sigmoid: unary("LOGISTIC"),
    nn.Tanh: unary("TANH"),
    nn.GELU: unary("GELU", "Gelu", approximate=lambda m: m.approximate == "tanh"),
    nn.ELU: _elu,
    nn.Mish: in_float(_mish),
    nn.Softplus: in_float(_softplus),
    nn.Softmax: _softmax,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.AdaptiveMaxPool2d: _adaptive_pool,
    nn.Upsample: _upsample,
    nn.ZeroPad2d: _zero_pad,
}
