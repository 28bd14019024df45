"""Turn a TensorFlow Lite graph into an ONNX graph with channels first, and import that.

What the ONNX importer does (frees the batch, merges biases, compares with ONNX Runtime) is done here too; in the end
the network is compared with LiteRT on the file itself.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from rewriter.errors import TraceError
from rewriter.onnx_import import OnnxNetwork, import_model
from rewriter.tflite_import.file import File, read_file
from rewriter.tflite_import.graph import FIRST, OPERATORS, Graph

OPSET = 17
# HardSwish and Gelu are operators of later sets, which the importer knows in any.
GELU_OPSET = 20
# Largest difference of an output from LiteRT's, relative to its largest value; LiteRT's own kernels round in other orders.
TOLERANCE = 2e-3
LEAST_ERROR = 1e-6


def import_tflite(path: Path) -> OnnxNetwork:
    """The float network in a TensorFlow Lite file: a free batch, channels first, in eval mode.

    Inputs and outputs of four dimensions are (N, C, H, W), where an output is a map that an operator on images made.

    Raises:
        TraceError: the file is no float model or has operators that are not supported (all are named), LiteRT is not
            installed, or what was imported does not compute what LiteRT does.
    """
    for part in ("layers", "elementwise", "data_movement"):
        importlib.import_module(f"rewriter.tflite_import.{part}")  # each registers its operators
    file = read_file(path)
    missing = Counter(o.kind for o in file.operators if o.kind not in OPERATORS)
    if missing:
        listed = ", ".join(f"{k} ({v})" for k, v in sorted(missing.items()))
        raise TraceError(f"tflite: {path.name}: operators that cannot be imported: {listed}")
    graph = Graph(file)
    model = _converted(graph, path)
    try:
        network = import_model(model, path)
    except TraceError as error:
        raise TraceError(f"tflite: {str(error).removeprefix('onnx: ')}") from error
    _compare(network, graph, path)
    return network


def tflite_sizes(path: Path) -> tuple[tuple[int, ...], ...]:
    """The shape of each input without its batch, an image's with channels first; errors as for `import_tflite`."""
    file = read_file(path)
    return tuple(_outer_shape(file, i)[1:] for i in file.inputs)


def _outer_shape(file: File, index: int) -> tuple[int, ...]:
    shape = file.values[index].shape
    return tuple(shape[a] for a in FIRST) if len(shape) == 4 else shape


def _converted(g: Graph, path: Path) -> onnx.ModelProto:
    file = g.file
    inputs: list[onnx.ValueInfoProto] = []
    for index in file.inputs:
        value = file.values[index]
        if value.kind != "float32":
            raise TraceError(
                f"tflite: {path.name}: input {value.name}: is {value.kind}, expected float32"
            )
        shape = _outer_shape(file, index)
        if not shape or min(shape) < 1 or shape[0] != 1:
            raise TraceError(
                f"tflite: {path.name}: input {value.name}: must have fixed sizes and a batch of 1: {value.shape}"
            )
        inputs.append(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
        g.put(index, value.name, image=len(shape) == 4)
    for operator in file.operators:
        g.label = g.name_of(operator)
        try:
            OPERATORS[operator.kind](g, operator)
        except TraceError:
            raise
        except Exception as error:
            what = f"{operator.kind} {g.label}"
            raise TraceError(
                f"tflite: {path.name}: {what}: {type(error).__name__}: {error}"
            ) from error
    outputs: list[onnx.ValueInfoProto] = []
    for index in file.outputs:
        g.label, name = "output", file.values[index].name
        held = g.image(index) if g.is_image(index) else g.native(index)
        g.nodes.append(helper.make_node("Identity", [held], [name]))
        outputs.append(onnx.ValueInfoProto(name=name))
    made = helper.make_graph(g.nodes, "g", inputs, outputs, g.constants)
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", _opset(g.nodes))], ir_version=9
    )


def _opset(nodes: Sequence[onnx.NodeProto]) -> int:
    return GELU_OPSET if any(n.op_type == "Gelu" for n in nodes) else OPSET


def _compare(network: OnnxNetwork, g: Graph, path: Path) -> None:
    interpreter: Any = importlib.import_module("ai_edge_litert.interpreter").Interpreter(
        str(path), num_threads=1
    )
    try:
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError):
        return  # an operator of the user's own, whose kernel LiteRT lacks: compared with ONNX Runtime alone
    random = np.random.default_rng(2)
    given = {i: random.standard_normal(g.shape(i)).astype(np.float32) for i in g.file.inputs}
    for index, x in given.items():
        interpreter.set_tensor(index, x)
    interpreter.invoke()
    feed = [torch.from_numpy(x.transpose(FIRST) if x.ndim == 4 else x) for x in given.values()]
    with torch.no_grad():
        made = network(*feed)
    made = made if isinstance(made, tuple) else (made,)
    for number, (index, found) in enumerate(zip(g.file.outputs, made, strict=True)):
        wanted = interpreter.get_tensor(index)
        if g.is_image(index):
            wanted = wanted.transpose(FIRST)
        error = float(np.abs(wanted.astype(np.float64) - found.numpy()).max())
        size = float(np.abs(wanted).max())
        if wanted.shape != tuple(found.shape) or not error <= TOLERANCE * size + LEAST_ERROR:
            raise TraceError(
                f"tflite: {path.name}: output {number} differs from LiteRT's by {error:.2g}, its largest value is {size:.2g}"
            )
