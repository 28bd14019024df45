"""Static checks of a QDQ file for TensorRT, by the published rules of its parser and its documentation.

Read, and never run: NVIDIA's "Working with Quantized Types" (explicit quantization) and the ONNX operator support
matrix of onnx-tensorrt. What is checked: DequantizeLinear reads INT8 alone; QuantizeLinear writes INT8; zero points are
0; scales are constant, positive and finite; activations have one scale; weights have one for each output channel, along
axis 0 of a convolution and axis 1 of a transposed one; biases are floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from rewriter.int8.findings import Finding

_AXIS = {"Conv": (0,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}


def tensorrt_faults(model: onnx.ModelProto) -> list[Finding]:
    """What TensorRT's parser would refuse, or not run in int8, by its published rules; empty: nothing known."""
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, place))
    found: list[Finding] = []
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            found += [Finding("tensorrt", node.name, text) for text in _faults(node, constants)]
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            found += _weight_faults(node, constants, readers)
    return found


def _faults(node: onnx.NodeProto, constants: dict[str, np.ndarray[Any, Any]]) -> Iterator[str]:
    scale = constants.get(node.input[1])
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    if scale is None:
        yield "its scale is not a constant"
    elif not (np.isfinite(scale).all() and (scale > 0).all()):
        yield "a scale is not a positive number"
    if zero is not None and zero.any():
        yield "its zero point is not 0, and TensorRT has symmetric quantization alone"
    if node.op_type == "DequantizeLinear" and node.input[0] in constants:
        kind = constants[node.input[0]].dtype
        if kind != np.int8:
            yield f"DequantizeLinear of {kind}: only INT8 is taken (a bias has to be float)"
    elif zero is None or zero.dtype != np.int8:
        yield f"{node.op_type} of {'uint8' if zero is None else zero.dtype}: only INT8 is taken"
    elif scale is not None and scale.size != 1:
        yield "an activation has more than one scale"


def _weight_faults(
    node: onnx.NodeProto,
    constants: dict[str, np.ndarray[Any, Any]],
    readers: dict[str, list[tuple[onnx.NodeProto, int]]],
) -> Iterator[Finding]:
    if constants.get(node.input[1], np.zeros(1)).size == 1:
        return
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    for reader, place in readers.get(node.output[0], []):
        if place == 1 and reader.op_type in _AXIS and axis not in _AXIS[reader.op_type]:
            yield Finding(
                "tensorrt", node.name, f"scales along axis {axis} of a {reader.op_type}'s weight"
            )
