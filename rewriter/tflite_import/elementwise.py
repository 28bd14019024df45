"""Activations, arithmetic and reductions of TensorFlow Lite as ONNX nodes."""

from __future__ import annotations

import numpy as np

from rewriter.errors import TraceError
from rewriter.tflite_import.file import Operator
from rewriter.tflite_import.graph import AXIS, FIRST, Graph, activated, operator

_UNARY = {
    "RELU": "Relu", "LOGISTIC": "Sigmoid", "TANH": "Tanh", "HARD_SWISH": "HardSwish", "EXP": "Exp", "LOG": "Log",
    "SQRT": "Sqrt", "NEG": "Neg", "ABS": "Abs", "FLOOR": "Floor", "CEIL": "Ceil", "ROUND": "Round", "SIN": "Sin",
    "COS": "Cos", "SIGN": "Sign", "ELU": "Elu",
}  # fmt: skip
_BINARY = {
    "ADD": "Add", "SUB": "Sub", "MUL": "Mul", "DIV": "Div", "MAXIMUM": "Max", "MINIMUM": "Min", "POW": "Pow",
    "SQUARED_DIFFERENCE": "Sub",
}  # fmt: skip
_REDUCTIONS = {
    "MEAN": "ReduceMean", "SUM": "ReduceSum", "REDUCE_MAX": "ReduceMax", "REDUCE_MIN": "ReduceMin",
    "REDUCE_PROD": "ReduceProd",
}  # fmt: skip


def _held(g: Graph, index: int) -> str:
    return g.image(index) if g.is_image(index) else g.native(index)


@operator(*_UNARY)
def unary(g: Graph, o: Operator) -> None:
    made = g.node(_UNARY[o.kind], [_held(g, o.inputs[0])])
    g.put(o.outputs[0], made, image=g.is_image(o.inputs[0]))


@operator("RELU6", "RELU_N1_TO_1", "RELU_0_TO_1")
def clip(g: Graph, o: Operator) -> None:
    low, high = {"RELU6": (0, 6), "RELU_N1_TO_1": (-1, 1), "RELU_0_TO_1": (0, 1)}[o.kind]
    limits = [g.constant(np.array(v, np.float32)) for v in (low, high)]
    g.put(
        o.outputs[0],
        g.node("Clip", [_held(g, o.inputs[0]), *limits]),
        image=g.is_image(o.inputs[0]),
    )


@operator("LEAKY_RELU")
def leaky(g: Graph, o: Operator) -> None:
    made = g.node("LeakyRelu", [_held(g, o.inputs[0])], alpha=float(o.options.alpha))
    g.put(o.outputs[0], made, image=g.is_image(o.inputs[0]))


@operator("GELU")
def gelu(g: Graph, o: Operator) -> None:
    x = _held(g, o.inputs[0])
    made = g.node("Gelu", [x], approximate="tanh" if o.options.approximate else "none")
    g.put(o.outputs[0], made, image=g.is_image(o.inputs[0]))


@operator("SQUARE", "RSQRT")
def power(g: Graph, o: Operator) -> None:
    x = _held(g, o.inputs[0])
    made = (
        g.node("Mul", [x, x])
        if o.kind == "SQUARE"
        else g.node("Reciprocal", [g.node("Sqrt", [x])])
    )
    g.put(o.outputs[0], made, image=g.is_image(o.inputs[0]))


@operator("PRELU")
def prelu(g: Graph, o: Operator) -> None:
    slope = g.array(o.inputs[1], "slope")
    if g.is_image(o.inputs[0]):
        slope = _as_image(slope)[0]
    made = g.node("PRelu", [_held(g, o.inputs[0]), g.constant(slope)])
    g.put(o.outputs[0], made, image=g.is_image(o.inputs[0]))


def _as_image(array: np.ndarray) -> np.ndarray:
    """A constant that is broadcast to channels last, for channels first."""
    return array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(FIRST)


@operator(*_BINARY)
def binary(g: Graph, o: Operator) -> None:
    image = len(g.shape(o.outputs[0])) == 4 and any(g.is_image(i) for i in o.inputs)
    image = image and all(g.is_constant(i) or len(g.shape(i)) == 4 for i in o.inputs)
    names = []
    for i in o.inputs:
        if not g.is_constant(i):
            names.append(g.image(i) if image else g.native(i))
            continue
        array = g.array(i, "operand")
        names.append(g.constant(_as_image(array) if image and array.ndim else array))
    made = g.node(_BINARY[o.kind], names)
    if o.kind == "SQUARED_DIFFERENCE":
        made = g.node("Mul", [made, made])
    fused = int(getattr(o.options, "fusedActivationFunction", 0) or 0)
    g.put(o.outputs[0], activated(g, made, fused), image=image)


@operator("ADD_N")
def add_n(g: Graph, o: Operator) -> None:
    image = all(g.is_image(i) for i in o.inputs)
    names = [g.image(i) if image else g.native(i) for i in o.inputs]
    g.put(o.outputs[0], g.node("Sum", names), image=image)


@operator(*_REDUCTIONS)
def reduction(g: Graph, o: Operator) -> None:
    rank = len(g.shape(o.inputs[0]))
    axes = [a % rank for a in g.numbers(o.inputs[1], "axes")]
    keep = bool(o.options.keepDims)
    # without its axes kept a map of two axes has no layout; what is left of three is the same in both
    image = g.is_image(o.inputs[0]) and (keep or sorted(axes) == [1, 2])
    if image:
        axes = sorted(AXIS[a] for a in axes)
    x = g.image(o.inputs[0]) if image else g.native(o.inputs[0])
    kind = _REDUCTIONS[o.kind]
    if kind == "ReduceSum":
        made = g.node(kind, [x, g.constant(np.array(axes, np.int64))], keepdims=int(keep))
    else:
        made = g.node(kind, [x], axes=axes, keepdims=int(keep))
    g.put(o.outputs[0], made, image=image and keep)


@operator("SOFTMAX", "LOG_SOFTMAX")
def softmax(g: Graph, o: Operator) -> None:
    image = g.is_image(o.inputs[0])
    x = _held(g, o.inputs[0])
    beta = float(getattr(o.options, "beta", 1.0) or 1.0)
    if beta != 1:
        x = g.node("Mul", [x, g.constant(np.array(beta, np.float32))])
    kind = "Softmax" if o.kind == "SOFTMAX" else "LogSoftmax"
    g.put(o.outputs[0], g.node(kind, [x], axis=1 if image else -1), image=image)


@operator("L2_NORMALIZATION")
def normalized(g: Graph, o: Operator) -> None:
    image = g.is_image(o.inputs[0])
    made = g.node("LpNormalization", [_held(g, o.inputs[0])], axis=1 if image else -1, p=2)
    g.put(o.outputs[0], made, image=image)


@operator("ARG_MAX", "ARG_MIN")
def arg_extreme(g: Graph, o: Operator) -> None:
    axis = g.numbers(o.inputs[1], "axis")[0]
    kind = "ArgMax" if o.kind == "ARG_MAX" else "ArgMin"
    g.put(o.outputs[0], g.node(kind, [g.native(o.inputs[0])], axis=axis, keepdims=0), image=False)


@operator("DEQUANTIZE", "DENSIFY", "CAST")
def widened(g: Graph, o: Operator) -> None:
    """Weights stored in half precision, or a change between float types; everything is float32 here."""
    kinds = {g.file.values[i].kind for i in (*o.inputs, *o.outputs)}
    if g.is_constant(o.inputs[0]):
        array = g.array(o.inputs[0], "value")
        to = g.file.values[o.outputs[0]].kind
        g.static[o.outputs[0]] = array.astype("float32" if "float" in to else to)
        return
    if not all(k.startswith("float") for k in kinds):
        raise TraceError(
            f"tflite: {g.label}: {o.kind} of {' to '.join(sorted(kinds))} is not supported"
        )
    g.put(o.outputs[0], _held(g, o.inputs[0]), image=g.is_image(o.inputs[0]))
