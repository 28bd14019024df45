"""An ONNX file as it lies on disk: read, checked, with a free batch, and its values for small inputs.

The shapes of all values, and every value that depends on shapes and constants alone, are found by
running the file once with ONNX Runtime (twice where its batch is free, with batches of 2 and of 3): no
shape arithmetic has to be understood, it is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from rewriter.errors import TraceError

Array = np.ndarray[Any, Any]
# Operators whose outputs depend on the shape of their input alone.
SHAPES = ("Shape", "Size")
BATCHES = (2, 3)
DEFAULT_DOMAINS = ("", "ai.onnx", "com.microsoft")


@dataclass(frozen=True)
class Values:
    """What is known of the values of a graph before any of them is computed in torch.

    Attributes:
        shapes: (shape with the first batch, shape with the second) of every value; the two are the
            same object where the file has one batch only.
        static: the values, with either batch, that depend on constants and shapes alone.
        free: whether the file takes any batch.
    """

    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    static: Mapping[str, tuple[Array, Array]]
    free: bool


def read_file(path: Path) -> onnx.ModelProto:
    """A checked model.

    Raises:
        TraceError: the file is missing, no ONNX model, already quantized, or has control flow.
    """
    try:
        model = onnx.load(str(path))
    except FileNotFoundError as error:
        raise TraceError(f"onnx: no such file: {path}") from error
    except Exception as error:  # whatever the parser of a damaged file raises
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TraceError(f"onnx: {path.name}: not readable as an ONNX model: {first}") from error
    if not model.graph.node:
        raise TraceError(f"onnx: {path.name}: the graph has no operators")
    kinds = {n.op_type for n in model.graph.node}
    quantized = sorted(k for k in kinds if k.startswith(("QLinear", "QuantizeL", "DequantizeL")))
    if quantized:
        raise TraceError(
            f"onnx: {path.name}: is quantized already ({', '.join(quantized)}); give the float model"
        )
    control = sorted(kinds & {"If", "Loop", "Scan"})
    if control:
        raise TraceError(
            f"onnx: {path.name}: has control flow ({', '.join(control)}), which no static graph has; "
            "export it with fixed input sizes, or simplify it"
        )
    _widen(model)
    return model


_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def _widen(model: onnx.ModelProto) -> None:
    """Make a file in half precision one in float32 with the same weights, in place.

    The network is a float32 one from here on, and runtimes have no half-precision kernels for many operators.
    """
    graph, whole = model.graph, onnx.TensorProto.FLOAT
    tensors = list(graph.initializer)
    for node in graph.node:
        for a in node.attribute:
            if a.type == onnx.AttributeProto.TENSOR:
                tensors.append(a.t)
            elif a.name in ("to", "dtype") and a.i in _HALF:
                a.i = whole
    for tensor in tensors:
        if tensor.data_type in _HALF:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _HALF:
            value.type.tensor_type.elem_type = whole
    if any(v.type.tensor_type.elem_type in _HALF for v in graph.value_info):
        del graph.value_info[:]


def input_shapes(
    model: onnx.ModelProto, sizes: Mapping[str, Sequence[int]] | Sequence[int] | None
) -> dict[str, tuple[int | None, ...]]:
    """The shape of each input, None for a free batch.

    Args:
        model: as read.
        sizes: of one input, without the batch, for all inputs or by name; needed where the file leaves
            them open.

    Raises:
        TraceError: a size is open and not given, or contradicts the file.
    """
    constants = {t.name for t in model.graph.initializer}
    found: dict[str, tuple[int | None, ...]] = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        if value.type.tensor_type.elem_type not in (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.DOUBLE,
        ):
            kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
            raise TraceError(f"onnx: input {value.name}: is {kind}, expected float values")
        # exporters write an open size as a name, as 0 or as -1
        dims = [d.dim_value if d.dim_value > 0 else None for d in value.type.tensor_type.shape.dim]
        given = sizes.get(value.name) if isinstance(sizes, Mapping) else sizes
        if given is not None:
            if dims and len(given) != len(dims) - 1:
                raise TraceError(
                    f"onnx: input {value.name}: {len(dims)} dimensions, the given shape {list(given)} "
                    "has no batch and must have one less"
                )
            wrong = [(d, g) for d, g in zip(dims[1:], given, strict=False) if d and d != g]
            if wrong:
                raise TraceError(
                    f"onnx: input {value.name}: the file says {wrong[0][0]}, given is {wrong[0][1]}"
                )
            dims = [dims[0] if dims else None, *given]
        if not dims or any(d is None for d in dims[1:]):
            raise TraceError(
                f"onnx: input {value.name}: its size is open in the file "
                f"({[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]}); give it as shape, "
                "without the batch, such as [3, 224, 224]"
            )
        found[value.name] = tuple(dims)
    if not found:
        raise TraceError("onnx: the graph has no inputs")
    return found


def depends_on_data(model: onnx.ModelProto, inputs: Sequence[str]) -> set[str]:
    """Names of all values that depend on what the inputs hold, not only on their shapes."""
    found = set(inputs)
    for node in model.graph.node:
        if node.op_type not in SHAPES and found.intersection(node.input):
            found.update(node.output)
    return found


def values_of(
    model: onnx.ModelProto, shapes: Mapping[str, tuple[int | None, ...]], seed: int = 0
) -> Values:
    """Shapes and static values of a graph, by running it.

    Raises:
        TraceError: ONNX Runtime cannot run the file.
    """
    free = all(s[0] is None for s in shapes.values())
    first = {n: (s[0] or BATCHES[0], *s[1:]) for n, s in shapes.items()}
    second = {n: (s[0] or BATCHES[1], *s[1:]) for n, s in shapes.items()}
    names = [o for n in model.graph.node for o in n.output if o]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    known = {o.name for o in watched.graph.output}
    watched.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
    runs = [_run(watched, names, feed, seed) for feed in ((first, second) if free else (first,))]
    one, two = runs[0], runs[-1]
    moving = depends_on_data(model, list(shapes))
    static = {n: (one[n], two[n]) for n in names if n not in moving}
    static |= {t.name: (a, a) for t in model.graph.initializer for a in [numpy_helper.to_array(t)]}
    sizes = {n: (one[n].shape, two[n].shape) for n in names}
    sizes |= {n: (first[n], second[n]) for n in shapes}
    sizes |= {n: (a.shape, b.shape) for n, (a, b) in static.items()}
    return Values(sizes, static, free)


def _run(
    model: onnx.ModelProto, names: Sequence[str], feed: Mapping[str, Sequence[Any]], seed: int
) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    random = np.random.default_rng(seed)
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        kinds = {
            i.name: np.float64 if "double" in i.type else np.float32 for i in session.get_inputs()
        }
        inputs = {n: random.standard_normal(tuple(s)).astype(kinds[n]) for n, s in feed.items()}
        made: Any = session.run(list(names), inputs)
        return dict(zip(names, made, strict=True))
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TraceError(f"onnx: ONNX Runtime cannot run the file: {first}") from error
