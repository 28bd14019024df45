"""How weights are stored in ONNX, and transposed convolutions.

ONNX Runtime has no int8 kernel for a transposed convolution on the CPU. With stride s each of the s x s phases of its output
is a plain convolution of the input with every s-th tap of the kernel, so that all of it is one convolution with s x s times
the channels, whose channels are then moved to their places. The same products are added, and those with taps that the kernel
does not have.
Source: Shi et al., 2016 (arXiv:1609.07009), section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.errors import QuantizeError
from rewriter.graph import facts
from rewriter.graph.lookup import module_of
from rewriter.graph.ops import clip_bounds, row_of
from rewriter.int8.integer_grid import LARGEST_BIAS, bias_steps, quantize_weight
from rewriter.int8.onnx.arguments import source_of
from rewriter.int8.onnx.builder import Emission, UnsupportedError, Value
from rewriter.int8.onnx.clips import clip_is_free
from rewriter.int8.scheme import channel_axis


def weight_and_bias(
    e: Emission, node: fx.Node, layer: Any, weight: Tensor, transposed: bool = False
) -> tuple[str, str]:
    """The weight and the bias ("" if there is none) as the layer reads them.

    An int8 weight is stored as int8, and its bias as int32 in steps of (input scale x weight
    scale), which is what the kernels add it in.

    Raises:
        QuantizeError: the bias needs more than 32 bits.
    """
    scale = None if e.quantized is None else e.quantized.calibration.weights.get(node.name)
    axis = None
    spec = e.note(node).weight
    if spec is not None and scale is not None and scale.ndim:
        axis = channel_axis(layer, spec)
    return stored(e, node, weight, layer.bias, scale, axis, transposed)


def stored(
    e: Emission,
    node: fx.Node,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    axis: int | None,
    transposed: bool = False,
) -> tuple[str, str]:
    """The same for a weight and a bias in an order of their own, with the scale of each entry of ``axis``."""
    spec = e.note(node).weight
    if spec is None or e.quantized is None:
        kept = weight.t() if transposed else weight
        return e.constant(kept, "weight"), "" if bias is None else e.constant(bias, "bias")
    assert scale is not None, node.name
    q = quantize_weight(weight, scale, spec, axis)
    attributes: dict[str, Any] = {} if axis is None else {"axis": 1 - axis if transposed else axis}
    w = e.op(
        "DequantizeLinear",
        e.constant(q.t() if transposed else q, "weight"),
        e.constant(scale, "weight_scale"),
        e.constant(torch.zeros(scale.shape, dtype=torch.int8), "weight_zero_point"),
        **attributes,
    )
    source: Any = node.args[0]
    if bias is None:
        return w, ""
    reads_int8 = isinstance(source, fx.Node) and source.name in e.note(node).reads
    if not reads_int8 or e.note(node).float_bias:
        return w, e.constant(bias, "bias")
    step = scale * torch.tensor(e.value_params(source)[0], dtype=torch.float32)
    steps = bias_steps(bias, step)
    if float(steps.abs().max()) > LARGEST_BIAS:
        raise QuantizeError(
            f"{node.name}: bias: {float(steps.abs().max()):.3g} steps of input scale x weight "
            f"scale, an int32 holds {LARGEST_BIAS}; a dead channel needs a larger weight scale"
        )
    b = e.op(
        "DequantizeLinear",
        e.constant(steps.to(torch.int32), "bias"),
        e.constant(step, "bias_scale"),
        **({} if axis is None else {"axis": 0}),
    )
    return w, b


def transposed_convolution(e: Emission, node: fx.Node, m: Any) -> Value:
    if len(node.args) > 1 or node.kwargs:
        raise UnsupportedError("output_size of a transposed convolution")
    if _by_phases(e, node, m):
        return _phased(e, node, m)
    w, b = weight_and_bias(e, node, m, m.weight)
    x = e.read(source_of(node), node)
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


def _by_phases(e: Emission, node: fx.Node, m: Any) -> bool:
    """Whether the target runs a transposed convolution in int8 as a convolution alone."""
    row = row_of(nn.ConvTranspose2d)
    if e.quantized is None or row is None or e.quantized.scheme.name in row.int8:
        return False
    plain = m.stride[0] == m.stride[1] and tuple(m.dilation) == (1, 1)
    reads = source_of(node).name in e.note(node).reads
    owner = _owner(e, node)
    if not plain or not reads or e.note(node).weight is None or owner is None:
        return False
    # a reader in float would find the value rounded, since it is moved in int8
    return all(owner.name in e.note(user).reads for user in owner.users)


def _owner(e: Emission, node: fx.Node) -> fx.Node | None:
    """Whose int8 value the layer's kernel writes: its own, or that of the clip behind it; None: it writes floats."""
    if e.note(node).output is not None:
        return node
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module" or e.note(users[0]).output is None:
        return None
    return users[0] if clip_bounds(module_of(e.gm, users[0])) is not None else None


def _phased(e: Emission, node: fx.Node, m: Any) -> Value:
    assert e.quantized is not None
    source, stride = source_of(node), m.stride[0]
    scale = e.quantized.calibration.weights[node.name]
    many = stride * stride
    scales = scale.repeat_interleave(many) if scale.ndim else scale
    bias = None if m.bias is None else m.bias.detach().repeat_interleave(many)
    w, b = stored(e, node, phases(m), bias, scales, 0 if scale.ndim else None)
    begin, end, crops = [], [], []
    sizes, outs = facts.SHAPE.of(source)[2:], facts.SHAPE.of(node)[2:]
    for size, out, kernel, pad in zip(sizes, outs, m.kernel_size, m.padding, strict=True):
        taps, first = math.ceil(kernel / stride), pad // stride
        count = (pad + out - 1) // stride + 1 - first  # positions of the convolution
        begin.append(taps - 1 - first)
        end.append(max(count - size - begin[-1] + taps - 1, 0))
        made = size + begin[-1] + end[-1] - taps + 1
        crops.append((pad % stride, made * stride, out))
    y = e.op(
        "Conv",
        *[e.read(source, node), w, *([b] if b else [])],
        kernel_shape=[math.ceil(k / stride) for k in m.kernel_size],
        strides=[1, 1],
        pads=begin + end,
        group=m.groups,
    )
    owner = _owner(e, node)
    assert owner is not None
    if owner is not node and not clip_is_free(e, owner):
        low, high = clip_bounds(module_of(e.gm, owner)) or (-math.inf, math.inf)
        y = e.op("Clip", y, e.scalar(low), e.scalar(min(high, 3e38)))
    y = e.rounded(y, owner)  # before the values are moved, so that the convolution writes int8
    if stride > 1:
        y = e.op("DepthToSpace", y, blocksize=stride, mode="CRD")
    if any(start or whole != out for start, whole, out in crops):
        starts = [start for start, _, _ in crops]
        ends = [start + out for start, _, out in crops]
        y = e.op("Slice", y, e.ints(starts), e.ints(ends), e.ints([2, 3]))
    return y


def phases(m: Any) -> Tensor:
    """(C_out * s * s, C_in / groups, taps, taps): the kernels of the phases of a transposed convolution of stride s.

    Output s q + r - padding is the sum over m of input q - m times tap r + m s, so that the convolution of phase r has
    the taps r, r + s, ... in reverse order.
    """
    weight, stride, groups = m.weight.detach(), m.stride[0], m.groups
    inputs, outputs, *kernel = weight.shape
    taps = [math.ceil(k / stride) for k in kernel]
    full = torch.zeros(inputs, outputs, *(t * stride for t in taps), dtype=weight.dtype)
    full[:, :, : kernel[0], : kernel[1]] = weight
    split = full.view(groups, inputs // groups, outputs, taps[0], stride, taps[1], stride)
    # -> groups, outputs, phase rows, phase columns, inputs of the group, taps reversed
    moved = split.permute(0, 2, 4, 6, 1, 3, 5).flip(5, 6)
    return moved.reshape(groups * outputs * stride * stride, inputs // groups, *taps).contiguous()
