"""ONNX activations, elementwise arithmetic, reductions and matrix products as torch functions and modules."""

from __future__ import annotations

import math
import operator as py
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx, nn
from torch.nn import functional

from rewriter.errors import TraceError
from rewriter.onnx_import.importer import OPERATORS, Importer, label, operator
from rewriter.onnx_import.layers import add_bias, parameter

F = functional

_MODULES: dict[str, Callable[[Importer, onnx.NodeProto], nn.Module]] = {
    "Relu": lambda im, n: nn.ReLU(),
    "LeakyRelu": lambda im, n: nn.LeakyReLU(float(im.attribute(n, "alpha", 0.01))),
    "Sigmoid": lambda im, n: nn.Sigmoid(),
    "Tanh": lambda im, n: nn.Tanh(),
    "HardSwish": lambda im, n: nn.Hardswish(),
    "Elu": lambda im, n: nn.ELU(float(im.attribute(n, "alpha", 1.0))),
    "Softplus": lambda im, n: nn.Softplus(),
    "Mish": lambda im, n: nn.Mish(),
    "Gelu": lambda im, n: nn.GELU(im.attribute(n, "approximate", "none")),
    "Swish": lambda im, n: nn.SiLU(),
    "Softsign": lambda im, n: nn.Softsign(),
}


def _module(im: Importer, node: onnx.NodeProto) -> fx.Node:
    return im.module(_MODULES[node.op_type](im, node), node, im.value(node.input[0]))


OPERATORS.update(dict.fromkeys(_MODULES, _module))

_UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Neg": torch.neg, "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt, "Erf": torch.erf,
    "Reciprocal": torch.reciprocal, "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round,
    "Sign": torch.sign, "Sin": torch.sin, "Cos": torch.cos, "Not": torch.logical_not, "Atan": torch.atan,
    "IsNaN": torch.isnan,
}  # fmt: skip


def _unary(im: Importer, node: onnx.NodeProto) -> fx.Node:
    return im.call(_UNARY[node.op_type], im.value(node.input[0]))


OPERATORS.update(dict.fromkeys(_UNARY, _unary))

_BINARY: dict[str, Callable[..., Any]] = {
    "Add": py.add, "Sub": py.sub, "Mul": py.mul, "Div": py.truediv, "Pow": torch.pow,
    "Equal": torch.eq, "Less": torch.lt, "LessOrEqual": torch.le, "Greater": torch.gt,
    "GreaterOrEqual": torch.ge, "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
}  # fmt: skip


def operand(im: Importer, name: str) -> Any:
    """A value, or the plain number that a constant of one element is."""
    if im.is_static(name):
        value = im.values.static[name][0]
        if value.size == 1 and value.ndim <= 1:
            return value.reshape(-1)[0].item()
    return im.value(name)


def _binary(im: Importer, node: onnx.NodeProto) -> fx.Node:
    if node.op_type == "Add" and (merged := add_bias(im, node)) is not None:
        return merged
    a, b = operand(im, node.input[0]), operand(im, node.input[1])
    if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
        a = im.value(node.input[0])
    if (node.op_type in ("Mul", "Div") and b == 1) or (node.op_type in ("Add", "Sub") and b == 0):
        return a  # exporters write such scales
    if node.op_type == "Pow" and isinstance(b, float) and b.is_integer():
        b = int(b)
    if node.op_type == "Div" and "int" in _kind(im, node.output[0]):
        return im.call(torch.div, a, b, rounding_mode="trunc")
    return im.call(_BINARY[node.op_type], a, b)


def _kind(im: Importer, name: str) -> str:
    found = im.values.static.get(name)
    return "" if found is None else found[0].dtype.name


OPERATORS.update(dict.fromkeys(_BINARY, _binary))


@operator("Mod")
def mod(im: Importer, node: onnx.NodeProto) -> fx.Node:
    function = torch.fmod if im.attribute(node, "fmod", 0) else torch.remainder
    return im.call(function, im.value(node.input[0]), operand(im, node.input[1]))


@operator("Min", "Max", "Sum", "Mean")
def several(im: Importer, node: onnx.NodeProto) -> fx.Node:
    values = [im.value(i) for i in node.input]
    functions = {"Min": torch.minimum, "Max": torch.maximum}
    function: Any = functions.get(node.op_type, torch.add)
    total = values[0]
    for other in values[1:]:
        total = im.call(function, total, other)
    return im.call(torch.mul, total, 1 / len(values)) if node.op_type == "Mean" else total


@operator("Clip")
def clip(im: Importer, node: onnx.NodeProto) -> fx.Node:
    limits: list[float] = []
    for i, (name, none) in enumerate((("min", -math.inf), ("max", math.inf)), 1):
        value = im.attribute(node, name)
        if value is None and im.given(node, i):
            value = im.constant(node, i, name).item()
        limits.append(none if value is None else float(value))
    low, high = limits
    if abs(low) > 1e38:
        low = -math.inf
    if abs(high) > 1e38:
        high = math.inf
    x = im.value(node.input[0])
    if (low, high) == (0.0, 6.0):
        return im.module(nn.ReLU6(), node, x)
    if (low, high) == (0.0, math.inf):
        return im.module(nn.ReLU(), node, x)
    if math.isinf(low) or math.isinf(high):
        return im.call(
            torch.clamp, x, None if math.isinf(low) else low, None if math.isinf(high) else high
        )
    return im.module(nn.Hardtanh(low, high), node, x)


@operator("PRelu")
def prelu(im: Importer, node: onnx.NodeProto) -> fx.Node:
    slope, x = im.constant(node, 1, "slope"), im.value(node.input[0])
    shape = im.shape(node.input[0])
    full = (1,) * (len(shape) - slope.ndim) + slope.shape
    channels = shape[1] if len(shape) > 1 else 1
    if slope.size == 1 or all(s == (channels if i == 1 else 1) for i, s in enumerate(full)):
        layer = nn.PReLU(slope.size)
        layer.weight = parameter(slope.reshape(-1))
        return im.module(layer, node, x)
    low = im.call(torch.clamp_max, x, 0.0)
    scaled = im.call(torch.mul, low, im.value(node.input[1]))
    return im.call(torch.add, im.call(F.relu, x), scaled)


@operator("HardSigmoid")
def hard_sigmoid(im: Importer, node: onnx.NodeProto) -> fx.Node:
    alpha, beta = float(im.attribute(node, "alpha", 0.2)), float(im.attribute(node, "beta", 0.5))
    x = im.value(node.input[0])
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return im.module(nn.Hardsigmoid(), node, x)
    return im.call(torch.clamp, im.call(py.add, im.call(py.mul, x, alpha), beta), 0, 1)


@operator("Selu")
def selu(im: Importer, node: onnx.NodeProto) -> fx.Node:
    alpha, gamma = (
        float(im.attribute(node, k, v)) for k, v in (("alpha", 1.67326), ("gamma", 1.0507))
    )
    return im.call(py.mul, im.module(nn.ELU(alpha), node, im.value(node.input[0])), gamma)


@operator("ThresholdedRelu")
def thresholded(im: Importer, node: onnx.NodeProto) -> fx.Node:
    return im.call(
        F.threshold, im.value(node.input[0]), float(im.attribute(node, "alpha", 1.0)), 0.0
    )


@operator("Softmax", "LogSoftmax")
def softmax(im: Importer, node: onnx.NodeProto) -> fx.Node:
    shape, x = im.shape(node.input[0]), im.value(node.input[0])
    axis = int(im.attribute(node, "axis", 1 if im.opset < 13 else -1)) % len(shape)
    if im.opset < 13 and axis != len(shape) - 1 and math.prod(shape[axis + 1 :]) > 1:
        flat = im.method("flatten", x, axis)  # old operator sets normalize over all that follows
        y = im.module(_softmax(node, axis), node, flat)
        return im.method("reshape", y, *im.sizes(node))
    return im.module(_softmax(node, axis), node, x)


def _softmax(node: onnx.NodeProto, axis: int) -> nn.Module:
    return nn.Softmax(axis) if node.op_type == "Softmax" else nn.LogSoftmax(axis)


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin,
}  # fmt: skip


@operator(*_REDUCTIONS, "ReduceL2", "ReduceL1", "ReduceSumSquare", "ReduceProd", "ReduceLogSumExp")
def reduction(im: Importer, node: onnx.NodeProto) -> fx.Node:
    shape, x = im.shape(node.input[0]), im.value(node.input[0])
    axes = im.numbers(node, "axes", 1)
    if not axes:
        if im.attribute(node, "noop_with_empty_axes", 0):
            return x
        axes = list(range(len(shape)))
    axes, keep = [a % len(shape) for a in axes], bool(im.attribute(node, "keepdims", 1))
    if node.op_type in _REDUCTIONS:
        return im.call(_REDUCTIONS[node.op_type], x, axes, keep)
    if node.op_type == "ReduceL1":
        return im.call(torch.sum, im.call(torch.abs, x), axes, keep)
    if node.op_type == "ReduceLogSumExp":
        return im.call(torch.logsumexp, x, axes, keep)
    if node.op_type == "ReduceProd":
        if len(axes) != 1:
            raise TraceError(
                f"onnx: {label(node)}: a product over {len(axes)} axes is not supported"
            )
        return im.call(torch.prod, x, axes[0], keep)
    total = im.call(torch.sum, im.call(py.mul, x, x), axes, keep)
    return im.call(torch.sqrt, total) if node.op_type == "ReduceL2" else total


@operator("ArgMax", "ArgMin")
def arg_extreme(im: Importer, node: onnx.NodeProto) -> fx.Node:
    function = torch.argmax if node.op_type == "ArgMax" else torch.argmin
    axis, keep = int(im.attribute(node, "axis", 0)), bool(im.attribute(node, "keepdims", 1))
    return im.call(function, im.value(node.input[0]), axis, keep)


@operator("LpNormalization")
def lp_normalization(im: Importer, node: onnx.NodeProto) -> fx.Node:
    p, axis = float(im.attribute(node, "p", 2)), int(im.attribute(node, "axis", -1))
    return im.call(F.normalize, im.value(node.input[0]), p, axis)


@operator("Where")
def where(im: Importer, node: onnx.NodeProto) -> fx.Node:
    return im.call(torch.where, *[im.value(i) for i in node.input])


@operator("Einsum")
def einsum(im: Importer, node: onnx.NodeProto) -> fx.Node:
    return im.call(
        torch.einsum, im.attribute(node, "equation"), *[im.value(i) for i in node.input]
    )


@operator("CumSum")
def cumulative_sum(im: Importer, node: onnx.NodeProto) -> fx.Node:
    if im.attribute(node, "exclusive", 0) or im.attribute(node, "reverse", 0):
        raise TraceError(f"onnx: {label(node)}: exclusive and reverse are not supported")
    return im.call(torch.cumsum, im.value(node.input[0]), int(im.constant(node, 1, "axis").item()))


@operator("Cast")
def cast(im: Importer, node: onnx.NodeProto) -> fx.Node:
    to = int(im.attribute(node, "to"))
    kind: Any = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to))
    x = im.value(node.input[0])
    if kind.kind == "f":
        return im.method("float", x)  # everything is float32 here, half precision too
    return im.method("to", x, {"b": torch.bool, "i": torch.int64, "u": torch.int64}[kind.kind])
