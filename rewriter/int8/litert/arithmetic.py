"""How arithmetic and reductions are written for LiteRT: in int8 where there is a kernel, else in float."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx

from rewriter.int8.annotate import annotation
from rewriter.int8.litert.activations import (
    binary,
    float_clip,
    plain,
    softmax,
    written,
)
from rewriter.int8.litert.arguments import argument, axis_of
from rewriter.int8.litert.builder import (
    Emission,
    UnsupportedError,
    Value,
    is_float,
    shape_of,
    source_of,
)
from rewriter.int8.litert.writer import Grid, options

Emitter = Callable[[Emission, fx.Node], None]


# ------------------------------------------------------------------------------------- arithmetic


def _operand(e: Emission, value: Any, node: fx.Node, rank: int, in_float: bool) -> Value:
    """One side of an operation that broadcasts: as many dimensions as the result has."""
    if isinstance(value, (int, float)):
        return e.scalar(float(value))
    if isinstance(value, fx.Node) and not is_float(value):
        raise UnsupportedError(f"arithmetic with {value.meta.get('dtype')}")
    x = e.read_float(value, node) if in_float else e.read(value, node)
    if 0 < len(x.shape) < rank:
        x = e.reshape(x, (*[1] * (rank - len(x.shape)), *x.shape))
    return x


def _is_read(value: Any, reads: tuple[str, ...]) -> bool:
    return isinstance(value, fx.Node) and value.name in reads


def _number(e: Emission, value: float) -> Value:
    """A number as an int8 constant: 127 steps of its own."""
    scale = np.float32(abs(value) / 127 or 1.0)
    q = np.array(int(np.sign(value)) * 127, np.int8)
    index = e.w.constant(f"{e.place}.number", q, Grid(scale))  # type: ignore[arg-type]
    return Value(index, (), (float(scale), 0))


def _sides(node: fx.Node) -> tuple[Any, Any]:
    if node.kwargs and set(node.kwargs) != {"other"}:
        raise UnsupportedError(f"{', '.join(node.kwargs)} of an arithmetic operation")
    return node.args[0], argument(node, 1, "other")


def _arithmetic(code: str, kind: str, reverse: bool = False) -> Emitter:
    """ADD, MUL and their like: in int8 where both sides and the result are, with a clip if there is one."""

    def emit(e: Emission, node: fx.Node) -> None:
        sides = _sides(node)
        shape = shape_of(node)
        found = e.written(node)
        reads = annotation(node).reads
        # numbers beside an int8 value are int8 constants, exact to the last bit of their scale
        int8 = found is not None and code in ("ADD", "MUL", "SUB")
        int8 = int8 and any(isinstance(s, fx.Node) for s in sides)
        int8 = int8 and all(isinstance(s, (int, float)) or _is_read(s, reads) for s in sides)
        x, y = (
            _number(e, s)
            if int8 and not isinstance(s, fx.Node)
            else _operand(e, s, node, len(shape), not int8)
            for s in sides
        )
        if reverse:
            x, y = y, x
        if not int8 or found is None:
            e.set(node, e.op(code, [x, y], shape, None, options(kind)))
            return
        owner, clip = found
        activation, bounds = e.fused(clip, e.params(owner))
        opts = options(kind, fusedActivationFunction=activation)
        e.finish(e.op(code, [x, y], shape, e.params(owner), opts), owner, node, bounds)

    return emit


def _unary(code: str, kind: str | None = None) -> Emitter:
    """A float operator of one value."""

    def emit(e: Emission, node: fx.Node) -> None:
        e.set(node, plain(e, code, e.read_float(source_of(node), node), kind))

    return emit


def _sigmoid(code: str) -> Emitter:
    def emit(e: Emission, node: fx.Node) -> None:
        x = e.read(source_of(node), node)
        params = written(e, node, x)
        x = e.dequantize(x) if x.params is not None and params is None else x
        e.set(node, e.op(code, [x], x.shape, params))

    return emit


def _softmax(e: Emission, node: fx.Node) -> None:
    softmax(e, node, argument(node, 1, "dim"))


def _clamp(e: Emission, node: fx.Node) -> None:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if any(isinstance(b, fx.Node) for b in (low, high)):
        raise UnsupportedError("a clamp to computed bounds")
    x = e.read_float(source_of(node), node)
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    e.set(node, float_clip(e, x, float(low), float(high)))


def _reciprocal(e: Emission, node: fx.Node) -> None:
    x = e.read_float(source_of(node), node)
    one = e.w.constant(f"{e.place}.one", np.ones([1] * len(x.shape), np.float32))
    e.set(node, e.op("DIV", [one, x], x.shape, None, options("Div")))


def _pow(e: Emission, node: fx.Node) -> None:
    x, exponent = e.read_float(source_of(node), node), argument(node, 1, "exponent")
    if not isinstance(exponent, (int, float)):
        raise UnsupportedError("a computed exponent")
    if exponent == 2:
        e.set(node, binary(e, "MUL", "Mul", x, x))
        return
    e.set(node, binary(e, "POW", "Pow", x, e.scalar(float(exponent))))


def _square(e: Emission, node: fx.Node) -> None:
    x = e.read_float(source_of(node), node)
    e.set(node, binary(e, "MUL", "Mul", x, x))


def _reduction(code: str, int8: bool = False) -> Emitter:
    """A reduction over some dimensions; MEAN has an int8 kernel."""

    def emit(e: Emission, node: fx.Node) -> None:
        x = e.read(source_of(node), node)
        params = written(e, node, x) if int8 else None
        if x.params is not None and params is None:
            x = e.dequantize(x)
        dims, rank = argument(node, 1, "dim"), len(x.shape)
        dims = list(range(rank)) if dims in (None, (), []) else dims
        dims = [dims] if isinstance(dims, int) else list(dims)
        kept = [1 if d in {i % rank for i in dims} else s for d, s in enumerate(x.shape)]
        axes = e.ints(sorted(axis_of(d, rank) for d in dims))
        made = e.op(code, [x, axes], kept, params, options("Reducer", keepDims=True))
        e.set(node, e.reshape(made, shape_of(node)))

    return emit


def _matmul(e: Emission, node: fx.Node) -> None:
    x, y = (e.in_torch_order(_operand(e, s, node, 0, True)) for s in _sides(node))
    if len(x.shape) != len(y.shape) or len(x.shape) < 3:
        raise UnsupportedError("a matrix product of values with different numbers of dimensions")
    shape = shape_of(node)
    made = e.plain(shape, None)
    e.w.op("BATCH_MATMUL", [x.index, y.index], [made.index], options("BatchMatMul"))
    e.set(node, e.laid_out(made, shape))


ARITHMETIC: dict[str, Emitter] = {
    "abs": _unary("ABS", "Abs"),
    "add": _arithmetic("ADD", "Add"),
    "amax": _reduction("REDUCE_MAX"),
    "amin": _reduction("REDUCE_MIN"),
    "cos": _unary("COS", "Cos"),
    "exp": _unary("EXP", "Exp"),
    "floor": _unary("FLOOR"),
    "log": _unary("LOG"),
    "maximum": _arithmetic("MAXIMUM", "MaximumMinimum"),
    "mean": _reduction("MEAN", int8=True),
    "minimum": _arithmetic("MINIMUM", "MaximumMinimum"),
    "mul": _arithmetic("MUL", "Mul"),
    "neg": _unary("NEG", "Neg"),
    "pow": _pow,
    "reciprocal": _reciprocal,
    "rsqrt": _unary("RSQRT"),
    "rsub": _arithmetic("SUB", "Sub", reverse=True),
    "sigmoid": _sigmoid("LOGISTIC"),
    "sin": _unary("SIN"),
    "softmax": _softmax,
    "sqrt": _unary("SQRT"),
    "square": _square,
    "sub": _arithmetic("SUB", "Sub"),
    "sum": _reduction("SUM"),
    "tanh": _sigmoid("TANH"),
    **dict.fromkeys(("clamp", "clip"), _clamp),
    **dict.fromkeys(("div", "truediv"), _arithmetic("DIV", "Div")),
    **dict.fromkeys(("matmul", "bmm"), _matmul),
}
