"""What to know of a ``.tflite`` file: limits of compilers behind it, and what runs in float.

The Edge TPU compiler's limits are those of its documentation ("TensorFlow models on the Edge TPU", coral.ai): fully
integer operators, static shapes, tensors of at most three dimensions beside the batch, and the list of operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from rewriter.int8.findings import Finding
from rewriter.int8.simulate import Quantized

_NAMES = {
    value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)
}
# Ends of the file rather than arithmetic of the network.
ENDS = ("QUANTIZE", "DEQUANTIZE")
EDGE_TPU = frozenset(
    {
        "ADD",
        "AVERAGE_POOL_2D",
        "CONCATENATION",
        "CONV_2D",
        "DEPTHWISE_CONV_2D",
        "EXPAND_DIMS",
        "FULLY_CONNECTED",
        "L2_NORMALIZATION",
        "LOGISTIC",
        "MAXIMUM",
        "MAX_POOL_2D",
        "MEAN",
        "MINIMUM",
        "MUL",
        "PACK",
        "PAD",
        "PRELU",
        "QUANTIZE",
        "REDUCE_MAX",
        "REDUCE_MIN",
        "RELU",
        "RELU6",
        "RELU_N1_TO_1",
        "RESHAPE",
        "RESIZE_BILINEAR",
        "RESIZE_NEAREST_NEIGHBOR",
        "RSQRT",
        "SLICE",
        "SOFTMAX",
        "SPACE_TO_DEPTH",
        "SPLIT",
        "SQUEEZE",
        "STRIDED_SLICE",
        "SUB",
        "SUM",
        "SQUARED_DIFFERENCE",
        "TANH",
        "TRANSPOSE",
        "TRANSPOSE_CONV",
    }
)


def operators(file: bytes) -> list[tuple[str, bool, str]]:
    """Each operator's name, whether it computes in int8, and the name of what it writes, in running order."""
    model: Any = schema.ModelT.InitFromPackedBuf(file, 0)
    graph: Any = model.subgraphs[0]
    found: list[tuple[str, bool, str]] = []
    for op in graph.operators:
        code = model.operatorCodes[op.opcodeIndex]
        name = _NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)]
        made = graph.tensors[op.outputs[0]]
        reads = [graph.tensors[i] for i in op.inputs if i >= 0]
        int8 = schema.TensorType.INT8
        whole = made.type == int8 and any(t.type == int8 for t in reads)
        found.append((name, whole, made.name.decode()))
    return found


def lint(quantized: Quantized, file: bytes) -> list[Finding]:
    """Findings: operators in float, and operators that Edge TPU compilers leave to the processor."""
    del quantized
    return [*_float_operators(file), *_edge_tpu(file)]


def float_operators(file: bytes) -> dict[str, int]:
    """How many operators of each kind compute in float; those that only give values another shape are left out."""
    found = Counter(
        name for name, int8, _ in operators(file) if not int8 and name not in (*ENDS, "RESHAPE")
    )
    return dict(found)


def _float_operators(file: bytes) -> Iterator[Finding]:
    for name, int8, node in operators(file):
        if not int8 and name not in ENDS:
            yield Finding("float_layer", node, f"{name} runs in float")


def _edge_tpu(file: bytes) -> Iterator[Finding]:
    refused: dict[str, list[str]] = {}
    for name, int8, node in operators(file):
        if int8 and name not in EDGE_TPU:
            refused.setdefault(name, []).append(node)
    for name, nodes in refused.items():
        yield Finding(
            "edge_tpu",
            nodes[0],
            f"{name} ({len(nodes)} of them) is not among the operators of the Edge TPU compiler, which leaves all behind "
            "the first such one to the processor",
        )
    model: Any = schema.ModelT.InitFromPackedBuf(file, 0)
    deep = [t for t in model.subgraphs[0].tensors if t.shape is not None and len(t.shape) > 4]
    if deep:
        yield Finding(
            "edge_tpu",
            deep[0].name.decode(),
            "has more than four dimensions, which the Edge TPU compiler refuses",
        )
