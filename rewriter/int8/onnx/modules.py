"""How each torch.nn module of the normal form is written in ONNX: one function for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from rewriter.graph import facts
from rewriter.int8.onnx.activations import hard_sigmoid, hardswish, silu
from rewriter.int8.onnx.arguments import pad, source_of
from rewriter.int8.onnx.builder import Emission, UnsupportedError, Value
from rewriter.int8.onnx.layers import transposed_convolution, weight_and_bias
from rewriter.int8.onnx.pooling import adaptive_pool, average_pool, max_pool, upsample
from rewriter.int8.onnx.stems import over_blocks

Emitter = Callable[[Emission, fx.Node, Any], Value]

_PAD_MODES = {
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
    "constant": "constant",
}


# -------------------------------------------------------------------------------------- layers


def _convolution(e: Emission, node: fx.Node, m: Any) -> Value:
    source, (left, right, top, bottom) = node.args[0], (0, 0, 0, 0)
    assert isinstance(source, fx.Node)
    if source in e.pads:
        left, right, top, bottom = e.pads[source]
        (inner,) = source.all_input_nodes
        x, source = (
            e.read(inner, source, node),
            inner,
        )  # the convolution reads the pad as the pad reads its input
    else:
        x = e.read(source, node)
    begin, end = _padding(m)
    if m.padding_mode != "zeros" and any(begin + end):
        x = pad(e, x, [0, 0, *begin, 0, 0, *end], _PAD_MODES[m.padding_mode])
        begin = end = [0] * len(begin)
    if len(begin) == 2:
        begin, end = [begin[0] + top, begin[1] + left], [end[0] + bottom, end[1] + right]
        blocks = over_blocks(e, node, m, x, source, begin)
        if blocks is not None:
            return blocks
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


def _linear(e: Emission, node: fx.Node, m: Any) -> Value:
    x = e.read(source_of(node), node)
    if len(facts.SHAPE.of(source_of(node))) == 2:
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
    return e.op("BatchNormalization", e.read(source_of(node), node), *names, epsilon=m.eps)


def _layer_norm(e: Emission, node: fx.Node, m: Any) -> Value:
    weight = torch.ones(m.normalized_shape) if m.weight is None else m.weight
    names = [e.constant(weight, "weight")]
    if m.bias is not None:
        names.append(e.constant(m.bias, "bias"))
    x = e.read(source_of(node), node)
    return e.op("LayerNormalization", x, *names, axis=-len(m.normalized_shape), epsilon=m.eps)


# --------------------------------------------------------------------------------- activations


def _plain(kind: str, **settings: Callable[[Any], Any]) -> Emitter:
    """An activation that ONNX has: its name there, and its attributes from the module."""

    def emit(e: Emission, node: fx.Node, m: Any) -> Value:
        attributes = {name: of(m) for name, of in settings.items()}
        return e.op(kind, e.read(source_of(node), node), **attributes)

    return emit


def _clip(low: Callable[[Any], float], high: Callable[[Any], float]) -> Emitter:
    def emit(e: Emission, node: fx.Node, m: Any) -> Value:
        return e.op("Clip", e.read(source_of(node), node), e.scalar(low(m)), e.scalar(high(m)))

    return emit


def _prelu(e: Emission, node: fx.Node, m: nn.PReLU) -> Value:
    slope = m.weight.detach()
    if slope.numel() == 1:  # which has an int8 kernel
        return e.op("LeakyRelu", e.read(source_of(node), node), alpha=float(slope))
    slope = slope.view(-1, *[1] * (len(facts.SHAPE.of(source_of(node))) - 2))
    return e.op("PRelu", e.read(source_of(node), node), e.constant(slope, "slope"))


def _softplus(e: Emission, node: fx.Node, m: nn.Softplus) -> Value:
    x = e.read(source_of(node), node)
    if m.beta == 1:
        return e.op("Softplus", x)
    beta = e.scalar(m.beta)
    return e.op("Div", e.op("Softplus", e.op("Mul", x, beta)), beta)


def _softmax(e: Emission, node: fx.Node, m: nn.Softmax) -> Value:
    dim = m.dim
    if dim is None:  # torch's own rule for a missing dimension
        dim = 0 if len(facts.SHAPE.of(node)) in (0, 1, 3) else 1
    return e.op("Softmax", e.read(source_of(node), node), axis=dim)


# --------------------------------------------------------------------------------- moving


def _zero_pad(e: Emission, node: fx.Node, m: nn.ZeroPad2d) -> Value:
    left, right, top, bottom = m.padding
    rest = [0] * (len(facts.SHAPE.of(node)) - 2)
    return pad(e, e.read(source_of(node), node), [*rest, top, left, *rest, bottom, right])


def _pixel_shuffle(e: Emission, node: fx.Node, m: nn.PixelShuffle) -> Value:
    x = e.read(source_of(node), node)
    return e.op("DepthToSpace", x, blocksize=m.upscale_factor, mode="CRD")


def channel_shuffle(e: Emission, node: fx.Node, x: str, groups: int) -> str:
    """Channels (groups, C / groups) -> (C / groups, groups)."""
    channels, *places = facts.SHAPE.of(node)[1:]
    parts = e.op("Reshape", x, e.ints([0, groups, channels // groups, *places]))
    swapped = e.op("Transpose", parts, perm=[0, 2, 1, *range(3, 3 + len(places))])
    return e.op("Reshape", swapped, e.ints([0, channels, *places]))


def _channel_shuffle(e: Emission, node: fx.Node, m: nn.ChannelShuffle) -> Value:
    return channel_shuffle(e, node, e.read(source_of(node), node), m.groups)


MODULES: dict[type[nn.Module], Emitter] = {
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: transposed_convolution,
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.ReLU: _plain("Relu"),
    nn.ReLU6: _clip(lambda m: 0.0, lambda m: 6.0),
    nn.Hardtanh: _clip(lambda m: m.min_val, lambda m: m.max_val),
    nn.LeakyReLU: _plain("LeakyRelu", alpha=lambda m: m.negative_slope),
    nn.PReLU: _prelu,
    nn.SiLU: silu,
    nn.Hardswish: hardswish,
    nn.Hardsigmoid: hard_sigmoid,
    nn.Sigmoid: _plain("Sigmoid"),
    nn.Tanh: _plain("Tanh"),
    nn.GELU: _plain("Gelu", approximate=lambda m: m.approximate),
    nn.ELU: _plain("Elu", alpha=lambda m: float(m.alpha)),
    nn.Mish: _plain("Mish"),
    nn.Softplus: _softplus,
    nn.Softmax: _softmax,
    nn.MaxPool2d: max_pool,
    nn.AvgPool2d: average_pool,
    nn.AdaptiveAvgPool2d: adaptive_pool,
    nn.AdaptiveMaxPool2d: adaptive_pool,
    nn.ZeroPad2d: _zero_pad,
    nn.Upsample: upsample,
    nn.PixelShuffle: _pixel_shuffle,
    nn.ChannelShuffle: _channel_shuffle,
}
