"""What an emitted file does as ONNX Runtime really runs it, read from the graph that it optimizes and executes.

A file says only where values are rounded; which operations then run on int8 kernels is for the runtime to decide. A
convolution with a reader that has no int8 form, for example, is executed in float between its DequantizeLinear and the next
QuantizeLinear: exact, and many times slower than either network.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from torch import fx

from rewriter.graph import facts
from rewriter.graph.cost import node_macs
from rewriter.graph.lookup import layer_name, layers
from rewriter.int8.annotate import annotation, moves_values
from rewriter.int8.onnx.lint import float_layers
from rewriter.int8.onnx.session import Session
from rewriter.int8.simulate import Quantized

# Kernels that multiply stored integers.
INTEGER_KERNELS = frozenset(
    {
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
    }
)
_INTEGERS = frozenset({"QuantizeLinear", *INTEGER_KERNELS})
_FLOATS = frozenset({"DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
# They compute nothing: the same values under another shape, or another name.
_FREE = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape"})
_FLOAT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
# ONNX Runtime puts these behind the names of nodes that it moves.
_TOKEN = re.compile(r"_token_\d+$")
UNKNOWN = "ONNX Runtime has no int8 kernel for it as it stands"


@dataclass(frozen=True)
class FloatLayer:
    """A layer with weights that runs in float.

    Args:
        layer: the module's own qualified name.
        macs: multiply-accumulates for one input.
        reason: why.
    """

    layer: str
    macs: int
    reason: str


@dataclass(frozen=True)
class ReadBack:
    """What a file does.

    Args:
        int8_share: share of the MACs that int8 kernels compute, in [0, 1]; 1 where there are none.
        float_ops: how many operators of each kind run in float; those that only give values another shape are left out.
        float_layers: layers with weights that run in float, largest first.
    """

    int8_share: float
    float_ops: dict[str, int] = field(default_factory=dict[str, int])
    float_layers: tuple[FloatLayer, ...] = ()


def opened(
    quantized: Quantized, model: onnx.ModelProto, threads: int = 2
) -> tuple[Session, ReadBack]:
    """A session of an emitted file, and what it does: one pass through the optimizer for both.

    Args:
        quantized: what the file was emitted from.
        model: the file.
        threads: of the session.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session = Session(model, threads=threads, save_optimized=path)
        # the weights lie beside it and are not read
        optimized = onnx.load(str(path), load_external_data=False)
    return session, read_back(quantized, model, optimized)


def read_back(
    quantized: Quantized, model: onnx.ModelProto, optimized: onnx.ModelProto
) -> ReadBack:
    """What a file does.

    Args:
        quantized: what the file was emitted from.
        model: the file as it was emitted.
        optimized: the graph that ONNX Runtime executes.
    """
    gm = quantized.gm
    kernels: dict[str, bool] = {}
    for made in optimized.graph.node:
        name = _TOKEN.sub("", made.name).split(".", 1)[0]
        if made.op_type in INTEGER_KERNELS:
            kernels[name] = kernels.get(name, True)
        elif made.op_type in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm"):
            kernels[name] = (
                False  # of an operation that is emitted as several products all must be integer
            )
    in_int8 = {name for name, integer in kernels.items() if integer}
    reasons = {finding.node: finding.message for finding in float_layers(quantized, model)}
    return _found(gm, in_int8, _float_operators(optimized.graph), reasons)


def by_annotation(quantized: Quantized) -> ReadBack:
    """The same where the target's own kernels are not at hand: what has an int8 form is taken to run in it."""
    gm = quantized.gm
    in_int8: set[str] = set()
    others: Counter[str] = Counter()
    for node in gm.graph.nodes:
        note = annotation(node)
        if node.op in ("placeholder", "get_attr", "output") or facts.DTYPE.get(node) is None:
            continue
        if note.weight is not None and note.reads:
            in_int8.add(node.name)
        elif node.name in node_macs(gm) or not (
            note.reads or note.output is not None or moves_values(gm, node)
        ):
            others[_kind(gm, node)] += 1
    kept = {n.name: "kept in float, as asked" for n in layers(gm) if facts.KEEP_FLOAT.get(n)}
    return _found(gm, in_int8, dict(others), kept)


def _kind(gm: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))


def _found(
    gm: fx.GraphModule,
    in_int8: set[str],
    float_operators: dict[str, int],
    reasons: dict[str, str],
) -> ReadBack:
    macs = node_macs(gm)
    total = sum(macs.values())
    integer = sum(count for name, count in macs.items() if name in in_int8)
    left = [
        FloatLayer(layer_name(node), macs[node.name], reasons.get(node.name, UNKNOWN))
        for node in layers(gm)
        if node.name not in in_int8
    ]
    left.sort(key=lambda layer: -layer.macs)
    share = integer / total if total else 1.0
    return ReadBack(share, dict(sorted(float_operators.items())), tuple(left))


def _float_operators(graph: onnx.GraphProto) -> dict[str, int]:
    """Operators by kind whose values, apart from constants, are floats."""
    constants = {tensor.name for tensor in graph.initializer}
    real = {i.name: i.type.tensor_type.elem_type in _FLOAT_TYPES for i in graph.input}
    found: Counter[str] = Counter()
    for made in graph.node:
        read = [name for name in made.input if name and name not in constants]
        floats = any(real.get(name, False) for name in read)
        integer = made.op_type in _INTEGERS or made.op_type.startswith("QLinear")
        if floats and not integer and made.op_type not in _FREE:
            found[made.op_type] += 1
        writes = made.op_type in _FLOATS or (floats and not integer)
        if made.op_type == "QGemm":
            writes = len(made.input) < 8 or not made.input[7]
        elif made.op_type == "Cast":
            to = next(a.i for a in made.attribute if a.name == "to")
            writes = to in _FLOAT_TYPES
        elif made.op_type in ("Shape", "ArgMax", "ArgMin"):
            writes = False
        if _constant_only(made, read):
            continue  # such as weights that are dequantized at every run
        real.update(dict.fromkeys(made.output, writes))
    return dict(found)


def _constant_only(made: onnx.NodeProto, read: list[str]) -> bool:
    return not read and made.op_type != "Constant"
