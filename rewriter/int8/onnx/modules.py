"""How each torch.nn module of the normal form is written in ONNX: one function for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriter.errors import QuantizeError
from rewriter.int8.onnx.builder import Emission, UnsupportedError, Value
from rewriter.int8.scheme import channel_axis, quantize_weight

Emitter = Callable[[Emission, fx.Node, Any], Value]

_PAD_MODES = {
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
    "constant": "constant",
}
_INT32 = 2**31 - 1


def weight_and_bias(
    e: Emission, node: fx.Node, layer: Any, weight: Tensor, transposed: bool = False
) -> tuple[str, str]:
    """The weight and the bias ("" if there is none) as the layer reads them.

    An int8 weight is stored as int8, and its bias as int32 in steps of (input scale x weight
    scale), which is what the kernels add it in.

    Raises:
        QuantizeError: the bias needs more than 32 bits.
    """
    spec = e.note(node).weight
    bias: Tensor | None = layer.bias
    if spec is None or e.quantized is None:
        stored = weight.t() if transposed else weight
        return e.constant(stored, "weight"), "" if bias is None else e.constant(bias, "bias")
    scale = e.quantized.calibration.weights[node.name]
    axis = channel_axis(layer, spec) if scale.ndim else None
    q = quantize_weight(weight, scale, spec, axis)
    attributes: dict[str, Any] = {} if axis is None else {"axis": 1 - axis if transposed else axis}
    w = e.op(
        "DequantizeLinear",
        e.constant(q.t() if transposed else q, "weight"),
        e.constant(scale, "weight_scale"),
        e.constant(torch.zeros(scale.shape, dtype=torch.int8), "weight_zero_point"),
        **attributes,
    )
    source = node.args[0]
    if bias is None:
        return w, ""
    reads_int8 = isinstance(source, fx.Node) and source.name in e.note(node).reads
    if not reads_int8 or e.note(node).float_bias:
        return w, e.constant(bias, "bias")
    step = scale * torch.tensor(e.value_params(source)[0], dtype=torch.float32)
    steps = torch.round(bias.detach().double() / step.double())
    if float(steps.abs().max()) > _INT32:
        raise QuantizeError(
            f"{node.name}: bias: {float(steps.abs().max()):.3g} steps of input scale x weight "
            f"scale, an int32 holds {_INT32}; a dead channel needs a larger weight scale"
        )
    b = e.op(
        "DequantizeLinear",
        e.constant(steps.to(torch.int32), "bias"),
        e.constant(step, "bias_scale"),
        **({} if axis is None else {"axis": 0}),
    )
    return w, b


def _convolution(e: Emission, node: fx.Node, m: Any) -> Value:
    source, (left, right, top, bottom) = node.args[0], (0, 0, 0, 0)
    assert isinstance(source, fx.Node)
    if source in e.pads:
        left, right, top, bottom = e.pads[source]
        (inner,) = source.all_input_nodes
        x = e.read(inner, source, node)  # the convolution reads the pad as the pad reads its input
    else:
        x = e.read(source, node)
    begin, end = _padding(m)
    if m.padding_mode != "zeros" and any(begin + end):
        x = pad(e, x, [0, 0, *begin, 0, 0, *end], _PAD_MODES[m.padding_mode])
        begin = end = [0] * len(begin)
    if len(begin) == 2:
        begin, end = [begin[0] + top, begin[1] + left], [end[0] + bottom, end[1] + right]
    w, b = weight_and_bias(e, node, m, m.weight)
    return e.op(
        "Conv",
        *([x, w, b] if b else [x, w]),
        kernel_shape=list(m.kernel_size),
        strides=list(m.stride),
        pads=begin + end,
        dilations=list(m.dilation),
        group=m.groups,
    )


def _padding(m: Any) -> tuple[list[int], list[int]]:
    if m.padding == "valid":
        return [0] * len(m.kernel_size), [0] * len(m.kernel_size)
    if m.padding == "same":
        total = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        return [t // 2 for t in total], [t - t // 2 for t in total]
    return list(m.padding), list(m.padding)


def pad(e: Emission, x: str, pads: list[int], mode: str = "constant", value: float = 0.0) -> str:
    """Pad ``x`` by ``pads`` (all begins, then all ends)."""
    fill = [e.scalar(value)] if mode == "constant" else []
    return e.op("Pad", x, e.ints(pads), *fill, mode=mode)


def _transposed_convolution(e: Emission, node: fx.Node, m: Any) -> Value:
    if len(node.args) > 1 or node.kwargs:
        raise UnsupportedError("output_size of a transposed convolution")
    w, b = weight_and_bias(e, node, m, m.weight)
    x = e.read(_source(node), node)
    return e.op(
        "ConvTranspose",
        *([x, w, b] if b else [x, w]),
        kernel_shape=list(m.kernel_size),
        strides=list(m.stride),
        pads=list(m.padding) * 2,
        output_padding=list(m.output_padding),
        dilations=list(m.dilation),
        group=m.groups,
    )


def _linear(e: Emission, node: fx.Node, m: Any) -> Value:
    x = e.read(_source(node), node)
    if len(_source(node).meta["shape"]) == 2:
        w, b = weight_and_bias(e, node, m, m.weight)
        return e.op("Gemm", *([x, w, b] if b else [x, w]), transB=1)
    w, b = weight_and_bias(e, node, m, m.weight, transposed=True)
    y = e.op("MatMul", x, w)
    return e.op("Add", y, b) if b else y


def _batch_norm(e: Emission, node: fx.Node, m: Any) -> Value:
    if m.running_mean is None:
        raise UnsupportedError("batch norm without running statistics")
    ones = torch.ones_like(m.running_mean)
    parts = {
        "weight": ones if m.weight is None else m.weight,
        "bias": torch.zeros_like(ones) if m.bias is None else m.bias,
        "mean": m.running_mean,
        "variance": m.running_var,
    }
    names = [e.constant(value, label) for label, value in parts.items()]
    return e.op("BatchNormalization", e.read(_source(node), node), *names, epsilon=m.eps)


def _layer_norm(e: Emission, node: fx.Node, m: Any) -> Value:
    weight = torch.ones(m.normalized_shape) if m.weight is None else m.weight
    names = [e.constant(weight, "weight")]
    if m.bias is not None:
        names.append(e.constant(m.bias, "bias"))
    x = e.read(_source(node), node)
    return e.op("LayerNormalization", x, *names, axis=-len(m.normalized_shape), epsilon=m.eps)


# --------------------------------------------------------------------------------- activations


def _plain(kind: str, **settings: Callable[[Any], Any]) -> Emitter:
    """An activation that ONNX has: its name there, and its attributes from the module."""

    def emit(e: Emission, node: fx.Node, m: Any) -> Value:
        attributes = {name: of(m) for name, of in settings.items()}
        return e.op(kind, e.read(_source(node), node), **attributes)

    return emit


def _clip(low: Callable[[Any], float], high: Callable[[Any], float]) -> Emitter:
    def emit(e: Emission, node: fx.Node, m: Any) -> Value:
        return e.op("Clip", e.read(_source(node), node), e.scalar(low(m)), e.scalar(high(m)))

    return emit


def _silu(e: Emission, node: fx.Node, m: nn.SiLU) -> Value:
    x = e.read(_source(node), node)
    gate, inner = e.op("Sigmoid", x), e.note(node).inner
    return e.op("Mul", x, gate if inner is None else e.rounded_to(gate, inner, node))


def _hardswish(e: Emission, node: fx.Node, m: nn.Hardswish) -> Value:
    x = e.read(_source(node), node)
    return e.op("Mul", x, e.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))


def _prelu(e: Emission, node: fx.Node, m: nn.PReLU) -> Value:
    slope = m.weight.detach()
    if slope.numel() == 1:  # which has an int8 kernel
        return e.op("LeakyRelu", e.read(_source(node), node), alpha=float(slope))
    slope = slope.view(-1, *[1] * (len(_source(node).meta["shape"]) - 2))
    return e.op("PRelu", e.read(_source(node), node), e.constant(slope, "slope"))


def _softplus(e: Emission, node: fx.Node, m: nn.Softplus) -> Value:
    x = e.read(_source(node), node)
    if m.beta == 1:
        return e.op("Softplus", x)
    beta = e.scalar(m.beta)
    return e.op("Div", e.op("Softplus", e.op("Mul", x, beta)), beta)


def _softmax(e: Emission, node: fx.Node, m: nn.Softmax) -> Value:
    dim = m.dim
    if dim is None:  # torch's own rule for a missing dimension
        dim = 0 if len(node.meta["shape"]) in (0, 1, 3) else 1
    return e.op("Softmax", e.read(_source(node), node), axis=dim)


# ------------------------------------------------------------------------- pooling and resizing


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _windows(node: fx.Node, m: Any) -> tuple[list[int], ...]:
    """Kernel, stride, begin and end pads of a pool; the end pads make room for ``ceil_mode``."""
    kernel, padding = _pair(m.kernel_size), _pair(m.padding)
    stride = _pair(m.stride if m.stride is not None else m.kernel_size)
    dilation = _pair(getattr(m, "dilation", 1))
    end: list[int] = []
    for i in range(2):
        size, out = _source(node).meta["shape"][-2 + i], node.meta["shape"][-2 + i]
        reach = (out - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        end.append(max(reach - size - padding[i], padding[i] if not m.ceil_mode else 0))
    return list(kernel), list(stride), list(padding), end


def _max_pool(e: Emission, node: fx.Node, m: nn.MaxPool2d) -> Value:
    if m.return_indices:
        raise UnsupportedError("indices of a max pool")
    kernel, stride, begin, end = _windows(node, m)
    return e.op(
        "MaxPool",
        e.read(_source(node), node),
        kernel_shape=kernel,
        strides=stride,
        pads=begin + end,
        dilations=list(_pair(m.dilation)),
    )


def _average_pool(e: Emission, node: fx.Node, m: nn.AvgPool2d) -> Value:
    if m.divisor_override is not None:
        raise UnsupportedError("divisor_override of an average pool")
    kernel, stride, begin, end = _windows(node, m)
    x = e.read(_source(node), node)
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


def _adaptive_pool(e: Emission, node: fx.Node, m: Any) -> Value:
    x, average = e.read(_source(node), node), isinstance(m, nn.AdaptiveAvgPool2d)
    sizes, outs = _source(node).meta["shape"][-2:], node.meta["shape"][-2:]
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


def _upsample(e: Emission, node: fx.Node, m: nn.Upsample) -> Value:
    mode = m.mode
    if mode != "bicubic" and mode not in _RESIZE_MODES:
        raise UnsupportedError(f"resizing by {mode}")
    sizes, outs = _source(node).meta["shape"][2:], node.meta["shape"][2:]
    attributes: dict[str, Any] = {"mode": _RESIZE_MODES.get(mode, "cubic")}
    if mode == "nearest":
        attributes |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    elif mode == "nearest-exact":
        attributes["nearest_mode"] = "round_prefer_ceil"
    elif m.align_corners:
        attributes["coordinate_transformation_mode"] = "align_corners"
    if mode == "bicubic":
        attributes["cubic_coeff_a"] = -0.75
    x = e.read(_source(node), node)
    factor = m.scale_factor
    if factor is not None and not m.recompute_scale_factor:
        factors = list(factor) if isinstance(factor, tuple) else [factor] * len(sizes)
    elif all(o % s == 0 for s, o in zip(sizes, outs, strict=True)):
        factors = [o / s for s, o in zip(sizes, outs, strict=True)]
    else:
        axes = list(range(2, 2 + len(sizes)))
        return e.op("Resize", x, "", "", e.ints(list(outs)), axes=axes, **attributes)
    scales = e.constant(np.array([1, 1, *factors], dtype=np.float32), "scales")
    return e.op("Resize", x, "", scales, **attributes)


def _zero_pad(e: Emission, node: fx.Node, m: nn.ZeroPad2d) -> Value:
    left, right, top, bottom = m.padding
    rest = [0] * (len(node.meta["shape"]) - 2)
    return pad(e, e.read(_source(node), node), [*rest, top, left, *rest, bottom, right])


def _pixel_shuffle(e: Emission, node: fx.Node, m: nn.PixelShuffle) -> Value:
    x = e.read(_source(node), node)
    return e.op("DepthToSpace", x, blocksize=m.upscale_factor, mode="CRD")


def channel_shuffle(e: Emission, node: fx.Node, x: str, groups: int) -> str:
    """Channels (groups, C / groups) -> (C / groups, groups)."""
    channels, *places = node.meta["shape"][1:]
    parts = e.op("Reshape", x, e.ints([0, groups, channels // groups, *places]))
    swapped = e.op("Transpose", parts, perm=[0, 2, 1, *range(3, 3 + len(places))])
    return e.op("Reshape", swapped, e.ints([0, channels, *places]))


def _channel_shuffle(e: Emission, node: fx.Node, m: nn.ChannelShuffle) -> Value:
    return channel_shuffle(e, node, e.read(_source(node), node), m.groups)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        raise UnsupportedError("input is no value of the graph")
    return source


MODULES: dict[type[nn.Module], Emitter] = {
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _transposed_convolution,
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.ReLU: _plain("Relu"),
    nn.ReLU6: _clip(lambda m: 0.0, lambda m: 6.0),
    nn.Hardtanh: _clip(lambda m: m.min_val, lambda m: m.max_val),
    nn.LeakyReLU: _plain("LeakyRelu", alpha=lambda m: m.negative_slope),
    nn.PReLU: _prelu,
    nn.SiLU: _silu,
    nn.Hardswish: _hardswish,
    nn.Hardsigmoid: _plain("HardSigmoid", alpha=lambda m: 1 / 6, beta=lambda m: 0.5),
    nn.Sigmoid: _plain("Sigmoid"),
    nn.Tanh: _plain("Tanh"),
    nn.GELU: _plain("Gelu", approximate=lambda m: m.approximate),
    nn.ELU: _plain("Elu", alpha=lambda m: float(m.alpha)),
    nn.Mish: _plain("Mish"),
    nn.Softplus: _softplus,
    nn.Softmax: _softmax,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.AdaptiveMaxPool2d: _adaptive_pool,
    nn.ZeroPad2d: _zero_pad,
    nn.Upsample: _upsample,
    nn.PixelShuffle: _pixel_shuffle,
    nn.ChannelShuffle: _channel_shuffle,
}
