"""The first convolution of a network, of few channels and stride 2, as one of stride 1 over blocks of 2 x 2 places.

Integer kernels gather their inputs channel by channel of each place, and three bytes at a time are slow. The places of a block
become channels (SpaceToDepth), and tap t of the kernel, which reads row 2 i - p + t, becomes tap (t - p) // 2 of phase
(t - p) % 2. The same products are added, and those with taps that the kernel does not have, which are zero: equal to the last bit.
Source: Shi et al., 2016 (arXiv:1609.07009), the other way round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.int8.onnx.builder import Emission
from rewriter.int8.onnx.layers import stored
from rewriter.int8.scheme import channel_axis

BLOCK = 2
# With more channels than these the kernels gather enough at a time.
MOST_CHANNELS = 4


def over_blocks(
    e: Emission, node: fx.Node, m: Any, x: str, source: fx.Node, begin: list[int]
) -> str | None:
    """The convolution over blocks; None where there is none, or it gains nothing.

    Args:
        e: what is emitted.
        node: the convolution.
        m: its module.
        x: the tensor that it reads.
        source: the value that this is, before any pad.
        begin: rows and columns of zeros before it.
    """
    spec = e.note(node).weight
    if e.quantized is None or spec is None or not e.is_dequantized(x):
        return None
    plain = tuple(m.stride) == (BLOCK, BLOCK) and tuple(m.dilation) == (1, 1) and m.groups == 1
    few = m.in_channels <= MOST_CHANNELS and max(m.kernel_size) > 1
    if nn.Hardswish not in e.quantized.scheme.inner_values or not plain or not few:
        return None
    sizes, outs = facts.SHAPE.of(source)[2:], facts.SHAPE.of(node)[2:]
    scale = e.quantized.calibration.weights[node.name]
    axis = channel_axis(m, spec) if scale.ndim else None
    weight = blocked(m.weight.detach(), begin)
    taps, before = list(weight.shape[2:]), [-(-p // BLOCK) for p in begin]
    after = [
        out - size // BLOCK - first + k - 1
        for out, size, first, k in zip(outs, sizes, before, taps, strict=True)
    ]
    if any(size % BLOCK for size in sizes) or min(after) < 0:
        return None
    w, b = stored(e, node, weight, m.bias, scale, axis)
    integers, params = e.integers_behind(x)
    read = e.op("DequantizeLinear", e.op("SpaceToDepth", integers, blocksize=BLOCK), *params)
    return e.op(
        "Conv",
        *([read, w, b] if b else [read, w]),
        kernel_shape=taps,
        strides=[1, 1],
        pads=before + after,
    )


def blocked(weight: Tensor, begin: list[int]) -> Tensor:
    """(C_out, 4 C_in, taps, taps) of (C_out, C_in, rows, columns); channels in the order of SpaceToDepth."""
    outs, ins, rows, columns = weight.shape
    first = [-p // BLOCK for p in begin]
    taps = [
        (k - 1 - p) // BLOCK - f + 1 for k, p, f in zip((rows, columns), begin, first, strict=True)
    ]
    made = torch.zeros(outs, BLOCK, BLOCK, ins, *taps, dtype=weight.dtype)
    for row in range(rows):
        for column in range(columns):
            a, b = row - begin[0], column - begin[1]
            place = a // BLOCK - first[0], b // BLOCK - first[1]
            made[:, a % BLOCK, b % BLOCK, :, place[0], place[1]] = weight[:, :, row, column]
    return made.flatten(1, 3)
