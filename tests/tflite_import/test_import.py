"""TensorFlow Lite files read as torch networks; the oracle is LiteRT on files written here with the schema's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rewriter import quantize, target, trace
from rewriter.errors import TraceError
from rewriter.int8.onnx import Session, to_onnx
from rewriter.tflite_import import elementwise, graph, import_tflite, tflite_sizes

flatbuffers = pytest.importorskip("flatbuffers")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
interpreter = pytest.importorskip("ai_edge_litert.interpreter")

RANDOM = np.random.default_rng(0)
Arrays = dict[str, Any]
KINDS = {"float32": 0, "float16": 1, "int32": 2, "int8": 9}


def array(*shape: int) -> np.ndarray[Any, Any]:
    return RANDOM.standard_normal(shape).astype(np.float32)


def ints(*values: Any) -> np.ndarray[Any, Any]:
    return np.array(values, np.int32)


def made(kind: str, **values: Any) -> Any:
    """An options table of the schema."""
    table = getattr(schema, f"{kind}T")()
    for name, value in values.items():
        assert hasattr(table, name)
        setattr(table, name, value)
    return table


def file(
    path: Path,
    steps: list[tuple[str, list[str], str, Any]],
    constants: Arrays,
    shapes: dict[str, tuple[int, ...]],
    sparse: dict[str, Any] | None = None,
    quantized: str = "",
) -> Path:
    """A graph from ``x`` to the output of the last step; ``shapes`` of what is computed."""
    model = schema.ModelT()
    model.version, model.buffers = 3, [schema.BufferT()]
    part = schema.SubGraphT()
    part.tensors, part.operators = [], []
    where: dict[str, int] = {}
    for name in [*constants, *shapes]:
        tensor = schema.TensorT()
        tensor.name, tensor.buffer = name, 0
        value = constants.get(name)
        tensor.type = schema.TensorType.FLOAT32
        tensor.shape = list(shapes[name] if value is None else value.shape)
        if value is not None:
            tensor.type = KINDS[value.dtype.name]
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(value.tobytes(), np.uint8)
            tensor.buffer = len(model.buffers)
            model.buffers.append(buffer)
        if sparse and name in sparse:
            tensor.sparsity, tensor.shape = sparse[name], list(sparse[name].whole)
        if name == quantized:
            tensor.quantization = made("QuantizationParameters", scale=[0.1], zeroPoint=[0])
            tensor.type = schema.TensorType.INT8
        where[name] = len(part.tensors)
        part.tensors.append(tensor)
    model.operatorCodes = []
    for kind, inputs, output, options in steps:
        code = schema.OperatorCodeT()
        number = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode, code.builtinCode, code.version = min(number, 127), number, 1
        operator = schema.OperatorT()
        operator.opcodeIndex = len(model.operatorCodes)
        operator.inputs, operator.outputs = [where[i] for i in inputs], [where[output]]
        if options is not None:
            name = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            operator.builtinOptions = options
        model.operatorCodes.append(code)
        part.operators.append(operator)
    part.inputs, part.outputs = [where["x"]], [where[steps[-1][2]]]
    model.subgraphs = [part]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def check(path: Path, *, image: bool) -> nn.Module:
    """One input and a batch of several against LiteRT on each."""
    net = import_tflite(path)
    lite = interpreter.Interpreter(str(path))
    lite.allocate_tensors()
    x = array(3, *lite.get_input_details()[0]["shape"][1:])
    rows = []
    for one in x:
        lite.set_tensor(lite.get_input_details()[0]["index"], one[None])
        lite.invoke()
        rows.append(lite.get_tensor(lite.get_output_details()[0]["index"]))
    wanted = torch.from_numpy(np.concatenate(rows))
    feed = torch.from_numpy(x.transpose(0, 3, 1, 2).copy() if x.ndim == 4 else x)
    wanted = wanted.permute(0, 3, 1, 2) if image else wanted
    torch.testing.assert_close(net(feed), wanted, rtol=1e-4, atol=1e-5)
    trace(net, feed[:2])
    return net


X = (1, 9, 12, 4)
CONV = made(
    "Conv2DOptions",
    padding=0,
    strideH=2,
    strideW=2,
    dilationHFactor=1,
    dilationWFactor=1,
    fusedActivationFunction=3,
)
VALID = made(
    "Conv2DOptions",
    padding=1,
    strideH=1,
    strideW=2,
    dilationHFactor=2,
    dilationWFactor=1,
    fusedActivationFunction=1,
)
DEEP = made(
    "DepthwiseConv2DOptions",
    padding=0,
    strideH=2,
    strideW=2,
    depthMultiplier=2,
    dilationHFactor=1,
    dilationWFactor=1,
)
HUGE = made("ResizeNearestNeighborOptions")
SIDE = made("ConcatenationOptions", axis=3)
BACK = made("TransposeConvOptions", padding=0, strideH=2, strideW=2)
POOL = made("Pool2DOptions", padding=0, strideH=2, strideW=2, filterHeight=3, filterWidth=2)
NONE = made("Pool2DOptions", padding=1, strideH=2, strideW=2, filterHeight=3, filterWidth=2)
KEEP = made("ReducerOptions", keepDims=True)
SQUEEZED = made("ReducerOptions", keepDims=False)
DENSE = made("FullyConnectedOptions", fusedActivationFunction=1)
# name, steps, constants, shape of y, whether y is a map
CASES: list[tuple[str, list[Any], Arrays, tuple[int, ...], bool]] = [
    ("conv same", [("CONV_2D", ["x", "w", "b"], "y", CONV)], {"w": array(5, 3, 3, 4), "b": array(5)}, (1, 5, 6, 5), True),
    ("conv valid", [("CONV_2D", ["x", "w", "b"], "y", VALID)], {"w": array(5, 3, 3, 4), "b": array(5)}, (1, 5, 5, 5), True),
    ("depthwise", [("DEPTHWISE_CONV_2D", ["x", "w", "b"], "y", DEEP)], {"w": array(1, 3, 3, 8), "b": array(8)}, (1, 5, 6, 8), True),
    ("transposed", [("TRANSPOSE_CONV", ["s", "w", "x"], "y", BACK)],
     {"w": array(3, 3, 3, 4), "s": ints(1, 18, 24, 3)}, (1, 18, 24, 3), True),
    ("max pool", [("MAX_POOL_2D", ["x"], "y", POOL)], {}, (1, 5, 6, 4), True),
    ("average pool same", [("AVERAGE_POOL_2D", ["x"], "y", POOL)], {}, (1, 5, 6, 4), True),
    ("average pool valid", [("AVERAGE_POOL_2D", ["x"], "y", NONE)], {}, (1, 4, 6, 4), True),
    ("prelu", [("PRELU", ["x", "s"], "y", None)], {"s": array(1, 1, 4)}, X, True),
    ("add of channels", [("ADD", ["x", "c"], "y", made("AddOptions", fusedActivationFunction=1))], {"c": array(4)}, X, True),
    ("product of a place", [("MUL", ["x", "c"], "y", made("MulOptions"))], {"c": array(9, 1, 1)}, X, True),
    ("hard swish", [("HARD_SWISH", ["x"], "y", None)], {}, X, True),
    ("mean kept", [("MEAN", ["x", "a"], "y", KEEP)], {"a": ints(1, 2)}, (1, 1, 1, 4), True),
    ("mean", [("MEAN", ["x", "a"], "y", SQUEEZED)], {"a": ints(1, 2)}, (1, 4), False),
    ("mean of channels", [("MEAN", ["x", "a"], "y", SQUEEZED)], {"a": ints(3)}, (1, 9, 12), False),
    ("pad", [("PAD", ["x", "p"], "y", made("PadOptions"))], {"p": ints([0, 0], [1, 2], [0, 3], [0, 2])}, (1, 12, 15, 6), True),
    ("concat", [("NEG", ["x"], "a", None), ("CONCATENATION", ["x", "a"], "y", SIDE)], {}, (1, 9, 12, 8), True),
    ("reshape then dense",
     [("MEAN", ["x", "a"], "m", KEEP), ("RESHAPE", ["m", "s"], "r", made("ReshapeOptions", newShape=[1, 4])),
      ("FULLY_CONNECTED", ["r", "w", "b"], "y", DENSE)],
     {"a": ints(1, 2), "s": ints(1, 4), "w": array(7, 4), "b": array(7)}, (1, 7), False),
    ("boxes", [("RESHAPE", ["x", "s"], "y", made("ReshapeOptions", newShape=[1, 108, 4]))], {"s": ints(1, 108, 4)}, (1, 108, 4), False),
    ("softmax", [("SOFTMAX", ["x"], "y", made("SoftmaxOptions", beta=1.0))], {}, X, True),
    ("strided slice",
     [("STRIDED_SLICE", ["x", "b", "e", "s"], "y", made("StridedSliceOptions", beginMask=1, endMask=1))],
     {"b": ints(0, 1, 0, 1), "e": ints(0, 8, 12, 3), "s": ints(1, 2, 3, 1)}, (1, 4, 4, 2), True),
    ("depth to space", [("DEPTH_TO_SPACE", ["x"], "y", made("DepthToSpaceOptions", blockSize=2))], {}, (1, 18, 24, 1), True),
    ("nearest", [("RESIZE_NEAREST_NEIGHBOR", ["x", "s"], "y", HUGE)], {"s": ints(18, 36)}, (1, 18, 36, 4), True),
    ("half precision", [("DEQUANTIZE", ["h"], "w", made("DequantizeOptions")), ("CONV_2D", ["x", "w", "b"], "y", CONV)],
     {"h": array(5, 3, 3, 4).astype(np.float16), "b": array(5)}, (1, 5, 6, 5), True),
    *((f"bilinear, corners {corners}, centers {centers}",
       [("RESIZE_BILINEAR", ["x", "s"], "y", made("ResizeBilinearOptions", alignCorners=corners, halfPixelCenters=centers))],
       {"s": ints(20, 31)}, (1, 20, 31, 4), True) for corners, centers in ((False, False), (True, False), (False, True))),
]  # fmt: skip
INNER = {"a": X, "m": (1, 1, 1, 4), "r": (1, 4), "w": (5, 3, 3, 4)}


@pytest.mark.parametrize(
    ("steps", "constants", "shape", "image"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_operators(
    steps: list[Any], constants: Arrays, shape: tuple[int, ...], image: bool, tmp_path: Path
) -> None:
    used = {name for s in steps for name in (*s[1], s[2])}
    shapes = {"x": X, "y": shape} | {
        n: s for n, s in INNER.items() if n in used and n not in constants
    }
    check(file(tmp_path / "net.tflite", steps, constants, shapes), image=image)


def small(path: Path, **more: Any) -> Path:
    steps = [
        ("CONV_2D", ["x", "w", "b"], "c", CONV),
        ("MEAN", ["c", "a"], "m", SQUEEZED),
        ("FULLY_CONNECTED", ["m", "v", "d"], "scores", DENSE),
    ]
    constants = {
        "w": array(5, 3, 3, 4),
        "b": array(5),
        "a": ints(1, 2),
        "v": array(6, 5),
        "d": array(6),
    }
    shapes = {"x": X, "c": (1, 5, 6, 5), "m": (1, 5), "scores": (1, 6)}
    return file(path, steps, constants, shapes, **more)


def test_to_an_int8_file_with_the_names_of_the_file(tmp_path: Path) -> None:
    path = small(tmp_path / "net.tflite")
    assert tflite_sizes(path) == ((4, 9, 12),)
    net = check(path, image=False)
    x = torch.randn(16, 4, 9, 12)
    gm = trace(net, x[:2])
    session = Session(to_onnx(quantize(gm, target("onnxruntime"), [x])))
    assert (session.inputs, session.outputs) == (["x"], ["scores"])
    wanted = net(x).numpy()
    assert np.abs(session.run(x)[0] - wanted).max() < 0.05 * np.abs(wanted).max()
    assert [type(m).__name__ for m in gm.children()].count("Linear") == 1


@pytest.mark.parametrize("block", [0, 2])
def test_sparse_weights_in_rows_and_in_blocks(block: int, tmp_path: Path) -> None:
    full = array(6, 4) * (RANDOM.random((6, 4)) < 0.4)
    if block:  # one of two neighboring columns is stored only together with the other
        full = np.repeat(RANDOM.random((6, 2)) < 0.5, 2, 1) * array(6, 4)
    full = full.astype(np.float32)
    pieces = full.reshape(6, -1, block or 1)
    kept = [np.flatnonzero(row.any(1)) for row in pieces]
    stored = np.concatenate([row[k].reshape(-1) for row, k in zip(pieces, kept, strict=True)])
    vector = lambda v: made("Int32Vector", values=list(map(int, v)))  # noqa: E731
    levels = [
        made("DimensionMetadata", format=0, denseSize=6),
        made(
            "DimensionMetadata", format=1,
            arraySegmentsType=schema.SparseIndexVector.Int32Vector, arraySegments=vector(np.cumsum([0, *map(len, kept)])),
            arrayIndicesType=schema.SparseIndexVector.Int32Vector, arrayIndices=vector(np.concatenate(kept)),
        ),
    ]  # fmt: skip
    sparsity = made("SparsityParameters", traversalOrder=[0, 1], blockMap=[], dimMetadata=levels)
    if block:
        sparsity.traversalOrder, sparsity.blockMap = [0, 1, 2], [1]
        levels.append(made("DimensionMetadata", format=0, denseSize=block))
    sparsity.whole = full.shape
    steps = [
        ("DENSIFY", ["s"], "d", made("DensifyOptions")),
        ("FULLY_CONNECTED", ["x", "d", "b"], "y", DENSE),
    ]
    path = file(
        tmp_path / "net.tflite",
        steps,
        {"s": stored, "b": array(6)},
        {"x": (1, 4), "d": (6, 4), "y": (1, 6)},
        {"s": sparsity},
    )
    net = import_tflite(path)
    x = torch.randn(5, 4)
    (bias,) = (m.bias for m in net.children() if isinstance(m, nn.Linear))
    torch.testing.assert_close(net(x), (x @ torch.from_numpy(full).T + bias).relu())


def test_refusals_name_the_subject_and_the_value(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no such file: .*absent\.tflite"):
        import_tflite(tmp_path / "absent.tflite")
    (tmp_path / "text.tflite").write_text("not a model")
    with pytest.raises(TraceError, match=r"text\.tflite: no TensorFlow Lite model"):
        import_tflite(tmp_path / "text.tflite")
    (tmp_path / "half.tflite").write_bytes(small(tmp_path / "net.tflite").read_bytes()[:200])
    with pytest.raises(TraceError, match=r"half\.tflite: damaged"):
        import_tflite(tmp_path / "half.tflite")
    with pytest.raises(TraceError, match=r"is quantized already \(c: int8\)"):
        import_tflite(small(tmp_path / "net.tflite", quantized="c"))
    steps = [("SPACE_TO_BATCH_ND", ["x", "c", "p"], "y", None)]
    odd = file(
        tmp_path / "odd.tflite",
        steps,
        {"c": ints(1, 1), "p": ints([0, 0], [0, 0])},
        {"x": X, "y": X},
    )
    with pytest.raises(TraceError, match=r"cannot be imported: SPACE_TO_BATCH_ND \(1\)"):
        import_tflite(odd)


def test_a_wrong_conversion_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path / "net.tflite", [("NEG", ["x"], "y", None)], {}, {"x": X, "y": X})
    check(path, image=True)
    monkeypatch.setitem(elementwise._UNARY, "NEG", "Abs")
    assert "NEG" in graph.OPERATORS
    with pytest.raises(TraceError, match="differs from LiteRT's"):
        import_tflite(path)
