"""Convolutions, linear layers, pooling and resizing of TensorFlow Lite as ONNX nodes."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from rewriter.errors import TraceError
from rewriter.tflite_import.file import Operator
from rewriter.tflite_import.graph import Graph, activated, operator


def _pads(
    padding: int,
    sizes: Sequence[int],
    kernel: Sequence[int],
    steps: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Begins and ends; SAME (0) puts the odd one at the end."""
    if padding != 0:
        return [0, 0, 0, 0]
    begins, ends = [], []
    for n, k, s, d in zip(sizes, kernel, steps, dilation, strict=True):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        begins.append(total // 2)
        ends.append(total - total // 2)
    return begins + ends


@operator("CONV_2D", "DEPTHWISE_CONV_2D")
def conv(g: Graph, o: Operator) -> None:
    weight, options = g.array(o.inputs[1], "weight"), o.options
    channels = g.shape(o.inputs[0])[3]
    if o.kind == "CONV_2D":
        weight = weight.transpose(0, 3, 1, 2)  # (out, h, w, in)
        groups = channels // weight.shape[1]
    else:  # (1, h, w, out), the multiples of one channel side by side
        weight, groups = weight.transpose(3, 0, 1, 2), channels
    kernel = list(weight.shape[2:])
    steps = [int(options.strideH), int(options.strideW)]
    dilation = [int(options.dilationHFactor), int(options.dilationWFactor)]
    pads = _pads(options.padding, g.shape(o.inputs[0])[1:3], kernel, steps, dilation)
    inputs = [g.image(o.inputs[0]), g.constant(weight)]
    if len(o.inputs) > 2 and o.inputs[2] >= 0:
        inputs.append(g.constant(g.array(o.inputs[2], "bias")))
    made = g.node(
        "Conv",
        inputs,
        kernel_shape=kernel,
        strides=steps,
        dilations=dilation,
        pads=pads,
        group=groups,
    )
    g.put(o.outputs[0], activated(g, made, options.fusedActivationFunction), image=True)


def _transposed(
    g: Graph,
    o: Operator,
    x: int,
    weight: int,
    bias: int,
    padding: int,
    steps: list[int],
    fused: int,
) -> None:
    w = g.array(weight, "weight").transpose(3, 0, 1, 2)  # (out, h, w, in) to (in, out, h, w)
    before, after = g.shape(x)[1:3], g.shape(o.outputs[0])[1:3]
    begins, ends, extra = [], [], []
    for n, m, k, s in zip(before, after, w.shape[2:], steps, strict=True):
        cut = (n - 1) * s + k - m if padding == 0 else 0
        begins.append(max(cut, 0) // 2)
        ends.append(max(cut, 0) - max(cut, 0) // 2)
        extra.append(m - ((n - 1) * s + k - begins[-1] - ends[-1]))
    inputs = [g.image(x), g.constant(w)]
    if bias >= 0:
        inputs.append(g.constant(g.array(bias, "bias")))
    made = g.node(
        "ConvTranspose", inputs, kernel_shape=list(w.shape[2:]), strides=steps, pads=begins + ends,
        output_padding=extra,
    )  # fmt: skip
    g.put(o.outputs[0], activated(g, made, fused), image=True)


@operator("TRANSPOSE_CONV")
def transposed_conv(g: Graph, o: Operator) -> None:
    steps = [int(o.options.strideH), int(o.options.strideW)]
    weight, x, bias = (*o.inputs[1:], -1)[:3]
    fused = int(getattr(o.options, "fusedActivationFunction", 0) or 0)
    _transposed(g, o, x, weight, bias, int(o.options.padding), steps, fused)


@operator("Convolution2DTransposeBias")
def mediapipe_transposed_conv(g: Graph, o: Operator) -> None:
    """MediaPipe's own: its options are three integers, padding (1 is SAME), step in width, step in height."""
    padding, width, height = (int(v) for v in struct.unpack_from("<iii", o.custom))
    x, weight, bias = o.inputs[:3]
    _transposed(g, o, x, weight, bias, 0 if padding == 1 else 1, [height, width], 0)


@operator("FULLY_CONNECTED")
def linear(g: Graph, o: Operator) -> None:
    weight = g.array(o.inputs[1], "weight")
    x = g.native(o.inputs[0])
    if not o.options.keepNumDims and len(g.shape(o.inputs[0])) != 2:
        rows = math.prod(g.shape(o.inputs[0])) // weight.shape[1]
        x = g.reshape(x, [rows, weight.shape[1]])
    made = g.node("MatMul", [x, g.constant(weight.T)])
    if len(o.inputs) > 2 and o.inputs[2] >= 0:
        made = g.node("Add", [made, g.constant(g.array(o.inputs[2], "bias"))])
    g.put(o.outputs[0], activated(g, made, o.options.fusedActivationFunction), image=False)


@operator("AVERAGE_POOL_2D", "MAX_POOL_2D")
def pool(g: Graph, o: Operator) -> None:
    kernel = [int(o.options.filterHeight), int(o.options.filterWidth)]
    steps = [int(o.options.strideH), int(o.options.strideW)]
    pads = _pads(o.options.padding, g.shape(o.inputs[0])[1:3], kernel, steps, [1, 1])
    kind = "MaxPool" if o.kind.startswith("MAX") else "AveragePool"
    made = g.node(kind, [g.image(o.inputs[0])], kernel_shape=kernel, strides=steps, pads=pads)
    g.put(o.outputs[0], activated(g, made, o.options.fusedActivationFunction), image=True)


@operator("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR")
def resize(g: Graph, o: Operator) -> None:
    linear = o.kind == "RESIZE_BILINEAR"
    corners = bool(o.options.alignCorners)
    half = bool(o.options.halfPixelCenters)
    how: dict[str, Any] = {"mode": "linear" if linear else "nearest"}
    how["coordinate_transformation_mode"] = (
        "align_corners" if corners else "half_pixel" if half else "asymmetric"
    )
    if not linear:
        if corners:
            raise TraceError(f"tflite: {g.label}: nearest with aligned corners is not supported")
        how["nearest_mode"] = "round_prefer_ceil" if half else "floor"
    n, h, w, c = g.shape(o.outputs[0])
    sizes = g.constant(np.array([n, c, h, w], np.int64))
    made = g.node("Resize", [g.image(o.inputs[0]), "", "", sizes], **how)
    g.put(o.outputs[0], made, image=True)


@operator("DEPTH_TO_SPACE", "SPACE_TO_DEPTH")
def blocks(g: Graph, o: Operator) -> None:
    kind = "DepthToSpace" if o.kind.startswith("D") else "SpaceToDepth"
    made = g.node(kind, [g.image(o.inputs[0])], blocksize=int(o.options.blockSize))
    g.put(o.outputs[0], made, image=True)


@operator("BATCH_MATMUL")
def matmul(g: Graph, o: Operator) -> None:
    names = []
    for index, flip in zip(o.inputs, (o.options.adjX, o.options.adjY), strict=True):
        rank = len(g.shape(index))
        order = [*range(rank - 2), rank - 1, rank - 2]
        if g.is_constant(index):
            array = g.array(index, "factor")
            names.append(g.constant(array.transpose(order) if flip else array))
        else:
            name = g.native(index)
            names.append(g.node("Transpose", [name], perm=order) if flip else name)
    g.put(o.outputs[0], g.node("MatMul", names), image=False)
