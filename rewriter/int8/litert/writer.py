"""A ``.tflite`` flatbuffer under construction: tensors, constants, operators.

The schema classes are those that LiteRT's own package ships. Constants are numpy arrays and written in one piece, so
that a file of megabytes takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

Array = np.ndarray[Any, Any]

_TYPES: dict[str, int] = {
    "float32": schema.TensorType.FLOAT32,
    "int8": schema.TensorType.INT8,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
    "bool": schema.TensorType.BOOL,
}
# The first version of each operator that has int8; those of the schema's first version are left out.
_VERSIONS = {
    "ADD": 2,
    "AVERAGE_POOL_2D": 2,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "DEQUANTIZE": 2,
    "FULLY_CONNECTED": 4,
    "LEAKY_RELU": 2,
    "LOGISTIC": 2,
    "MAXIMUM": 2,
    "MAX_POOL_2D": 2,
    "MEAN": 2,
    "MINIMUM": 2,
    "MUL": 2,
    "PAD": 2,
    "PADV2": 2,
    "RELU": 2,
    "RELU6": 2,
    "RESIZE_BILINEAR": 3,
    "RESIZE_NEAREST_NEIGHBOR": 3,
    "SOFTMAX": 2,
    "STRIDED_SLICE": 2,
    "SUB": 2,
    "TANH": 2,
    "TRANSPOSE": 2,
    "TRANSPOSE_CONV": 3,
}


@dataclass(frozen=True)
class Grid:
    """How an integer tensor is to be read: scales, zero points, and the axis of the scales.

    Args:
        scale: () or (C,) float32.
        zero_point: the same for all.
        axis: that the scales are along; None: one scale.
    """

    scale: Array
    zero_point: int = 0
    axis: int | None = None


class Writer:
    """Tensors, constants and operators of one graph, in the order in which they run."""

    def __init__(self) -> None:
        self._tensors: list[Any] = []
        self._buffers: list[Any] = [schema.BufferT()]
        self._operators: list[Any] = []
        self._codes: dict[str, int] = {}
        self._names: set[str] = set()

    def tensor(self, name: str, shape: Sequence[int], kind: str, grid: Grid | None = None) -> int:
        """A tensor that an operator writes, or an input; the number by which operators name it."""
        made: Any = schema.TensorT()
        made.name = self._unique(name)
        made.shape = np.array(shape, dtype=np.int32)
        made.type = _TYPES[kind]
        if grid is not None:
            made.quantization = grids = _untyped(schema.QuantizationParametersT())
            scale = np.atleast_1d(grid.scale).astype(np.float32)
            grids.scale = scale
            grids.zeroPoint = np.full(len(scale), grid.zero_point, dtype=np.int64)
            grids.quantizedDimension = grid.axis or 0
        self._tensors.append(made)
        return len(self._tensors) - 1

    def constant(self, name: str, value: Array, grid: Grid | None = None) -> int:
        """A tensor whose values the file holds."""
        value = np.ascontiguousarray(value)
        index = self.tensor(name, value.shape, str(value.dtype), grid)
        buffer: Any = schema.BufferT()
        buffer.data = value.reshape(-1).view(np.uint8)
        self._buffers.append(buffer)
        self._tensors[index].buffer = len(self._buffers) - 1
        return index

    def op(
        self, code: str, inputs: Sequence[int], outputs: Sequence[int], options: Any = None
    ) -> None:
        """Add one operator; -1 stands for an absent input."""
        made: Any = schema.OperatorT()
        made.opcodeIndex = self._codes.setdefault(code, len(self._codes))
        made.inputs = np.array(inputs, dtype=np.int32)
        made.outputs = np.array(outputs, dtype=np.int32)
        if options is not None:
            name = type(options).__name__.removesuffix("T")
            made.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            made.builtinOptions = options
        self._operators.append(made)

    def file(self, inputs: Sequence[int], outputs: Sequence[int], description: str) -> bytes:
        """The whole file."""
        graph: Any = schema.SubGraphT()
        graph.tensors, graph.operators, graph.name = self._tensors, self._operators, "main"
        graph.inputs = np.array(inputs, dtype=np.int32)
        graph.outputs = np.array(outputs, dtype=np.int32)
        model = schema.ModelT()
        model.version, model.description = 3, description
        model.subgraphs, model.buffers = [graph], self._buffers
        model.operatorCodes = [_operator_code(name) for name in self._codes]
        size = sum(len(b.data) for b in self._buffers if b.data is not None)
        builder = flatbuffers.Builder(size + 2**16)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _unique(self, name: str) -> str:
        found, number = name, 0
        while found in self._names:
            number += 1
            found = f"{name}.{number}"
        self._names.add(found)
        return found


def _operator_code(name: str) -> Any:
    made = schema.OperatorCodeT()
    made.builtinCode = getattr(schema.BuiltinOperator, name)
    made.deprecatedBuiltinCode = min(made.builtinCode, 127)  # where readers of old files look
    made.version = _VERSIONS.get(name, 1)
    return made


def options(kind: str, **values: Any) -> Any:
    """Options of an operator: ``options("Conv2D", strideW=2)``."""
    made = getattr(schema, f"{kind}OptionsT")()
    for name, value in values.items():
        assert hasattr(made, name), f"{kind}: {name}"
        setattr(made, name, value)
    return made


def _untyped(table: Any) -> Any:
    """A table of the schema, whose generated classes declare lists where they take arrays too."""
    return table
