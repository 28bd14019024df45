"""A ``.tflite`` file as it lies on disk: tensors and operators of its one graph, read with LiteRT's own schema."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.errors import TraceError

Array = np.ndarray[Any, Any]
_IDENTIFIER = b"TFL3"


@dataclass(frozen=True)
class Value:
    """A tensor: ``data`` is None where it is computed."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: Array | None


@dataclass(frozen=True)
class Operator:
    """One operator: ``kind`` as the schema calls it, a custom one by its own name; -1 is an input left out."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Any
    custom: bytes


@dataclass(frozen=True)
class File:
    """The only graph of a file; numbers are positions in ``values``."""

    values: tuple[Value, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def _schema() -> Any:
    try:
        return importlib.import_module("ai_edge_litert.schema_py_generated")
    except ImportError as error:
        raise TraceError(
            "tflite: reading such files needs LiteRT: pip install 'quantfix[litert]'"
        ) from error


def read_file(path: Path) -> File:
    """The graph of a float file.

    Raises:
        TraceError: the file is missing or damaged, has several graphs, or is quantized; or LiteRT is not installed.
    """
    schema = _schema()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TraceError(f"tflite: no such file: {path}") from error
    if content[4:8] != _IDENTIFIER:
        raise TraceError(f"tflite: {path.name}: no TensorFlow Lite model")
    try:
        model = schema.ModelT.InitFromPackedBuf(content, 0)
        graphs = list(model.subgraphs)
    except Exception as error:  # whatever the reader of a damaged flatbuffer raises
        raise TraceError(f"tflite: {path.name}: damaged: {type(error).__name__}") from error
    if len(graphs) != 1:
        raise TraceError(
            f"tflite: {path.name}: has {len(graphs)} graphs (control flow), expected 1"
        )
    graph = graphs[0]
    try:
        values = tuple(_value(schema, t, model.buffers, path.name) for t in graph.tensors)
        names = _names(schema.BuiltinOperator)
        operators = tuple(_operator(o, model.operatorCodes, names) for o in graph.operators)
    except (ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
        raise TraceError(f"tflite: {path.name}: damaged: {type(error).__name__}") from error
    computed = {i for o in operators for i in (*o.inputs, *o.outputs) if i >= 0}
    quantized = [
        values[i]
        for i in sorted({*computed, *graph.inputs})
        if values[i].kind in ("int8", "uint8", "int16")
        and graph.tensors[i].quantization is not None
        and graph.tensors[i].quantization.scale is not None
    ]
    if quantized:
        first = quantized[0]
        raise TraceError(
            f"tflite: {path.name}: is quantized already ({first.name}: {first.kind}); give the float model"
        )
    return File(values, operators, tuple(map(int, graph.inputs)), tuple(map(int, graph.outputs)))


def _names(kinds: Any) -> dict[int, str]:
    return {v: k for k, v in vars(kinds).items() if isinstance(v, int)}


def _value(schema: Any, tensor: Any, buffers: Any, file: str) -> Value:
    kind = _names(schema.TensorType)[tensor.type].lower()
    shape = tuple(int(s) for s in (() if tensor.shape is None else tensor.shape))
    name = tensor.name.decode() if isinstance(tensor.name, bytes) else str(tensor.name or "")
    data = buffers[tensor.buffer].data
    if data is None or len(data) == 0:
        return Value(name, shape, kind, None)
    kinds = {
        "float32": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64, "bool": np.bool_,
        "int8": np.int8, "uint8": np.uint8, "int16": np.int16, "float64": np.float64,
    }  # fmt: skip
    if kind not in kinds:
        raise TraceError(f"tflite: {file}: {name}: constants of {kind} are not supported")
    array = np.frombuffer(np.asarray(data, np.uint8).tobytes(), kinds[kind])
    if tensor.sparsity is not None:
        return Value(name, shape, kind, _dense(array, shape, tensor.sparsity))
    return Value(name, shape, kind, array.reshape(shape))


def _dense(values: Array, shape: tuple[int, ...], sparsity: Any) -> Array:
    """A sparse constant in full, level by level of its storage order: dimensions first, then those inside a block.

    Source: the format of TACO (Kjolstad et al., 2017), as the schema of TensorFlow Lite describes it.
    """
    places = np.zeros((1, 0), np.int64)  # of each stored prefix, its index at every level so far
    rows = np.zeros(1, np.int64)  # and its number within the level
    for level in sparsity.dimMetadata:
        if level.format == 0:
            size = int(level.denseSize)
            index = np.tile(np.arange(size), len(rows))
            places, rows = np.repeat(places, size, 0), np.repeat(rows, size) * size + index
        else:
            segments = np.asarray(level.arraySegments.values, np.int64)
            starts, counts = segments[rows], segments[rows + 1] - segments[rows]
            first = np.cumsum(counts) - counts
            rows = np.arange(counts.sum()) + np.repeat(starts - first, counts)
            places = np.repeat(places, counts, 0)
            index = np.asarray(level.arrayIndices.values, np.int64)[rows]
        places = np.concatenate([places, index[:, None]], 1)
    order = [int(i) for i in sparsity.traversalOrder]
    blocks = [] if sparsity.blockMap is None else [int(i) for i in sparsity.blockMap]
    where = np.zeros((len(places), len(shape)), np.int64)
    for level, axis in enumerate(order):
        if axis < len(shape):
            where[:, axis] += places[:, level]
        else:
            inside = blocks[axis - len(shape)]
            size = int(sparsity.dimMetadata[level].denseSize)
            where[:, inside] = where[:, inside] * size + places[:, level]
    full = np.zeros(shape, values.dtype)
    full[tuple(where.T)] = values
    return full


def _operator(operator: Any, codes: Any, names: dict[int, str]) -> Operator:
    code = codes[operator.opcodeIndex]
    kind = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
    if kind == "CUSTOM":
        own = code.customCode
        kind = own.decode() if isinstance(own, bytes) else str(own)
    custom = operator.customOptions
    return Operator(
        kind,
        tuple(int(i) for i in (() if operator.inputs is None else operator.inputs)),
        tuple(int(i) for i in operator.outputs),
        operator.builtinOptions,
        b"" if custom is None else bytes(bytearray(custom)),
    )
