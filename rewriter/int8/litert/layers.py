"""How convolutions and linear layers are written for LiteRT, in int8 and in float.

LiteRT pads by SAME (as little as the output size needs, the smaller half before) or not at all. torch's symmetric
padding is SAME only at stride 1 and by chance elsewhere; otherwise a PAD stands before the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriter.errors import QuantizeError
from rewriter.int8.annotate import annotation
from rewriter.int8.integer_grid import bias_steps, quantize_weight
from rewriter.int8.litert.builder import (
    Emission,
    UnsupportedError,
    Value,
    shape_of,
    source_of,
    stored_shape,
)
from rewriter.int8.litert.writer import Array, Grid, options
from rewriter.int8.scheme import channel_axis

Emitter = Callable[[Emission, fx.Node, Any], None]
SAME, VALID = 0, 1
_INT32 = 2**31 - 1


def padding_of(
    e: Emission,
    x: Value,
    out: tuple[int, int],
    window: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    begin: tuple[int, int],
    fill: float = 0.0,
) -> tuple[Value, int]:
    """What an operator with a sliding window reads, and how it pads.

    Args:
        e: the emission.
        x: (N, C, H, W) value to slide over.
        out: height and width of the output.
        window: kernel, strides and dilations, each of height and width.
        begin: padding above and to the left.
        fill: what is padded with; negative infinity for a max pool.
    """
    kernel, stride, dilation = window
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = x.shape[2:]
    need = [(o - 1) * s + r - n for o, s, r, n in zip(out, stride, reach, sizes, strict=True)]
    plain = all(b == 0 and n <= 0 for b, n in zip(begin, need, strict=True))
    if plain and all(
        (n - r) // s + 1 == o for n, r, s, o in zip(sizes, reach, stride, out, strict=True)
    ):
        return x, VALID
    same = all(
        o == -(-n // s) and max(m, 0) // 2 == b
        for o, n, s, m, b in zip(out, sizes, stride, need, begin, strict=True)
    )
    if same:
        return x, SAME
    end = [max(m - b, 0) for m, b in zip(need, begin, strict=True)]
    padded = pad(e, x, (begin[1], end[1], begin[0], end[0]), fill)
    # what the window does not reach would make the output larger
    extra = [
        (n + b + f - r) // s + 1 - o
        for n, b, f, r, s, o in zip(sizes, begin, end, reach, stride, out, strict=True)
    ]
    if any(extra):
        raise UnsupportedError("a window that does not reach its padding")
    return padded, VALID


def pad(e: Emission, x: Value, around: tuple[int, int, int, int], fill: float = 0.0) -> Value:
    """``x`` padded by (left, right, top, bottom), with zeros or with the least value there is."""
    left, right, top, bottom = around
    if not any(around):
        return x
    n, c, h, w = x.shape
    widths = e.ints(np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32))
    shape = (n, c, h + top + bottom, w + left + right)
    if fill == 0.0:
        return e.op("PAD", [x, widths], shape, x.params, options("Pad"))
    if x.params is None:
        lowest: Array = np.array([np.finfo(np.float32).min], np.float32)
        value = e.w.constant(f"{e.place}.fill", lowest)
    else:
        grid = Grid(np.float32(x.params[0]), x.params[1])  # type: ignore[arg-type]
        value = e.w.constant(f"{e.place}.fill", np.array([-128], np.int8), grid)
    return e.op("PADV2", [x, widths, value], shape, x.params, options("PadV2"))


def _weights(
    e: Emission, node: fx.Node, layer: Any, order: Callable[[Tensor], Tensor], axis: int
) -> tuple[int, int]:
    """The weight and the bias of a layer; without one, zeros.

    Args:
        e: the emission.
        node: the layer.
        layer: its module.
        order: brings torch's weight into the operator's layout.
        axis: of the output channels there.

    Raises:
        QuantizeError: the bias needs more than 32 bits.
    """
    weight, bias = layer.weight.detach(), layer.bias
    spec = annotation(node).weight
    channels = _channels(layer)
    zeros = torch.zeros(channels) if bias is None else bias.detach()
    if spec is None:
        w = e.w.constant(f"{e.place}.weight", order(weight).contiguous().numpy())
        return w, e.w.constant(f"{e.place}.bias", zeros.float().numpy())
    scale = e.quantized.calibration.weights[node.name]
    along = channel_axis(layer, spec) if scale.ndim else None
    q = order(quantize_weight(weight, scale, spec, along)).contiguous().numpy()
    scales: Array = scale.numpy().astype(np.float32)
    w = e.w.constant(f"{e.place}.weight", q, Grid(scales, 0, axis if scale.ndim else None))
    step = scale * torch.tensor(e.params(source_of(node))[0], dtype=torch.float32)
    steps = bias_steps(zeros, step)
    if float(steps.abs().max()) > _INT32:
        raise QuantizeError(
            f"{node.name}: bias: {float(steps.abs().max()):.3g} steps of input scale x weight scale, an int32 "
            f"holds {_INT32}; a dead channel needs a larger weight scale"
        )
    b = e.w.constant(
        f"{e.place}.bias",
        steps.to(torch.int32).numpy(),
        Grid(step.numpy(), 0, 0 if step.ndim else None),
    )
    return w, b


def _input(e: Emission, node: fx.Node) -> Value:
    source = source_of(node)
    if annotation(node).weight is None:
        return e.read_float(source, node)
    return e.read(source, node)


def _channels(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _target(e: Emission, node: fx.Node) -> tuple[fx.Node, nn.Module | None]:
    """Where a layer writes: the value that its int8 kernel makes, or its own float value."""
    if annotation(node).weight is None:
        return node, None
    found = e.written(node)
    if found is None:
        raise QuantizeError(
            f"{node.name}: its value has no int8 form, and no int8 kernel writes floats"
        )
    return found


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def convolution(e: Emission, node: fx.Node, m: nn.Conv2d | nn.Conv1d) -> None:
    """CONV_2D, or DEPTHWISE_CONV_2D where every group has one input channel; (N, C, L) is taken as (N, C, 1, L)."""
    if m.padding_mode != "zeros":
        raise UnsupportedError(f"padding by {m.padding_mode}")
    source = source_of(node)
    left, _, top, _ = e.pads.get(source, (0, 0, 0, 0))
    x = e.read(source.args[0], source) if source in e.pads else e.read(source, node)
    x = x if annotation(node).weight is not None or x.params is None else e.dequantize(x)
    owner, clip = _target(e, node)
    begin, shape = _begin(m), shape_of(node)
    window = (_pair(m.kernel_size), _pair(m.stride), _pair(m.dilation))
    line = isinstance(m, nn.Conv1d)
    if line:
        x = e.reshape(x, (*x.shape[:2], 1, x.shape[2]))
        begin, shape = (0, begin[1]), (*shape[:2], 1, shape[2])
        window = ((1, window[0][1]), (1, window[1][1]), (1, window[2][1]))
    out = (shape[2], shape[3])
    x, padding = padding_of(e, x, out, window, (begin[0] + top, begin[1] + left))
    depthwise = m.groups > 1 and m.groups == m.in_channels
    params = None if annotation(node).weight is None else e.params(owner)
    activation, bounds = e.fused(clip, params or (1.0, 0))
    settings = {
        "padding": padding,
        "strideH": window[1][0],
        "strideW": window[1][1],
        "dilationHFactor": window[2][0],
        "dilationWFactor": window[2][1],
        "fusedActivationFunction": activation,
    }
    if depthwise:
        # (C m, 1, H, W) -> (1, H, W, C m): channel c of the input makes the outputs c m to c m + m - 1
        w, b = _weights(e, node, m, lambda t: _plane(t).permute(1, 2, 3, 0), 3)
        opts = options(
            "DepthwiseConv2D", depthMultiplier=m.out_channels // m.in_channels, **settings
        )
        made = e.op("DEPTHWISE_CONV_2D", [x, w, b], shape, params, opts)
    else:
        w, b = _weights(e, node, m, lambda t: _plane(t).permute(0, 2, 3, 1), 0)
        made = e.op("CONV_2D", [x, w, b], shape, params, options("Conv2D", **settings))
    if line:
        made = e.reshape(made, shape_of(node))
    e.finish(made, owner, node, bounds)


def _plane(weight: Tensor) -> Tensor:
    return weight.unsqueeze(2) if weight.ndim == 3 else weight


def _begin(m: nn.Conv2d | nn.Conv1d) -> tuple[int, int]:
    if m.padding == "valid":
        return 0, 0
    if m.padding == "same":
        before = [d * (k - 1) // 2 for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        return before[0], before[-1]
    return _pair(m.padding)


def transposed_convolution(e: Emission, node: fx.Node, m: nn.ConvTranspose2d) -> None:
    """TRANSPOSE_CONV without padding, of which the middle is cut out: it pads otherwise than torch."""
    if m.groups != 1 or _pair(m.dilation) != (1, 1) or len(node.args) > 1 or node.kwargs:
        raise UnsupportedError("a transposed convolution with groups or dilation")
    x = _input(e, node)
    owner, clip = _target(e, node)
    n, c, *out = shape_of(node)
    kernel, stride, padding = _pair(m.kernel_size), _pair(m.stride), _pair(m.padding)
    whole = [
        max((s - 1) * t + k, o + p)
        for s, t, k, o, p in zip(x.shape[2:], stride, kernel, out, padding, strict=True)
    ]
    params = None if annotation(node).weight is None else e.params(owner)
    w, b = _weights(e, node, m, lambda t: t.permute(1, 2, 3, 0), 0)
    activation, bounds = e.fused(clip, params or (1.0, 0))
    opts = options(
        "TransposeConv",
        padding=VALID,
        strideH=stride[0],
        strideW=stride[1],
        fusedActivationFunction=activation,
    )
    sizes = e.ints(stored_shape((n, c, *whole)))
    made = e.op("TRANSPOSE_CONV", [sizes, w, x, b], (n, c, *whole), params, opts)
    if list(whole) != list(out):
        begin = e.ints([0, *padding, 0])
        end = e.ints([n, *(p + o for p, o in zip(padding, out, strict=True)), c])
        cut = options("StridedSlice")
        made = e.op(
            "STRIDED_SLICE", [made, begin, end, e.ints([1] * 4)], (n, c, *out), params, cut
        )
    e.finish(made, owner, node, bounds)


def linear(e: Emission, node: fx.Node, m: nn.Linear) -> None:
    """FULLY_CONNECTED on the last dimension."""
    x = e.in_torch_order(_input(e, node))
    owner, clip = _target(e, node)
    params = None if annotation(node).weight is None else e.params(owner)
    w, b = _weights(e, node, m, lambda t: t, 0)
    activation, bounds = e.fused(clip, params or (1.0, 0))
    shape = shape_of(node)
    opts = options(
        "FullyConnected", keepNumDims=len(shape) > 2, fusedActivationFunction=activation
    )
    if len(shape) == 4:  # written as torch has it, then moved
        flat = e.reshape_plain(x, (-1, x.shape[-1]))
        flat = e.op("FULLY_CONNECTED", [flat, w, b], (flat.shape[0], shape[-1]), params, opts)
        made = e.reshape(flat, shape)
    else:
        made = e.op("FULLY_CONNECTED", [x, w, b], shape, params, opts)
    e.finish(made, owner, node, bounds)


LAYERS: dict[type[nn.Module], Emitter] = {
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.ConvTranspose2d: transposed_convolution,
    nn.Linear: linear,
}
