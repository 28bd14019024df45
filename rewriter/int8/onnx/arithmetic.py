"""How arithmetic and reductions of a canonical graph are written in ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from rewriter.graph import facts
from rewriter.int8.annotate import with_number
from rewriter.int8.onnx.activations import spread_gate
from rewriter.int8.onnx.arguments import argument, axes, first, rank
from rewriter.int8.onnx.builder import Emission, UnsupportedError, Value

Emitter = Callable[[Emission, fx.Node], Value]


def _example(value: Any) -> Any:
    """What torch's type promotion needs to know of an operand."""
    if not isinstance(value, fx.Node):
        return value
    dtype = facts.DTYPE.get(value)
    return 1 if dtype is None else torch.empty((1,) * rank(value), dtype=dtype)


def _operands(e: Emission, node: fx.Node, *operands: Any, real: bool = False) -> Iterator[str]:
    """Tensors or numbers as ONNX tensors of the one type that torch computes in."""
    examples = [_example(o) for o in operands]
    dtype = torch.result_type(examples[0], examples[-1])
    for example in examples[1:-1]:
        dtype = torch.promote_types(dtype, torch.result_type(example, example))
    if real and not dtype.is_floating_point:
        dtype = torch.float32
    for o in operands:
        if isinstance(o, fx.Node):
            x = e.read(o, node)
            yield x if facts.DTYPE.get(o, torch.int64) is dtype else e.cast(x, dtype)
        elif isinstance(o, (bool, int, float)):
            yield e.scalar(o, dtype)
        else:
            raise UnsupportedError(f"operand of type {type(o).__name__}")


# ------------------------------------------------------------------------------------ arithmetic


def _unary(kind: str) -> Emitter:
    def emit(e: Emission, node: fx.Node) -> Value:
        if len(node.args) > 1 or node.kwargs:
            raise UnsupportedError("more than one argument")
        return e.op(kind, e.read(first(node), node))

    return emit


def _binary(kind: str) -> Emitter:
    def emit(e: Emission, node: fx.Node) -> Value:
        if node.kwargs.keys() - {"alpha", "other"}:
            raise UnsupportedError(f"arguments {sorted(node.kwargs)}")
        number = _by_number(e, node)
        if number is not None:
            return e.op(kind, *number)
        gated = _gated(e, node) if kind == "Mul" else None
        if gated is not None:
            return e.op(kind, *gated)
        real = kind == "Div"
        a, b = _operands(e, node, node.args[0], argument(node, 1, "other"), real=real)
        factor: Any = node.kwargs.get("alpha", 1)
        if factor != 1:
            b = e.op("Mul", b, e.scalar(factor))
        return e.op(kind, a, b)

    return emit


def _by_number(e: Emission, node: fx.Node) -> tuple[str, str] | None:
    """A value and a number as an int8 kernel reads them: the number is one step of its own scale, and so exact."""
    found = with_number(node)
    if found is None or found[0].name not in e.note(node).reads:
        return None
    if e.note(node).output is None and len(node.users) != 1:
        return None
    source, number = found
    x = e.read(source, node)
    return x, e.number_in_int8(number, e.integer_kind(x))


def _gated(e: Emission, node: fx.Node) -> tuple[str, str] | None:
    """A value (N, C, H, W) and its gate (N, C, 1, 1), both in int8."""
    values = [v for v in node.args if isinstance(v, fx.Node) and v.name in e.note(node).reads]
    if len(values) != 2 or node.kwargs:
        return None
    x, gate = sorted(values, key=lambda v: -math.prod(facts.SHAPE.of(v)))
    if facts.SHAPE.of(x)[:2] != facts.SHAPE.of(gate)[:2] or len(facts.SHAPE.of(x)) != 4:
        return None
    return e.read(x, node), spread_gate(e, gate, node, x)


def _logical(kind: str) -> Emitter:
    def emit(e: Emission, node: fx.Node) -> Value:
        if any(facts.DTYPE.get(n) is not torch.bool for n in node.all_input_nodes):
            raise UnsupportedError("a logical operation on numbers")
        return e.op(kind, *_operands(e, node, *node.args))

    return emit


def _not_equal(e: Emission, node: fx.Node) -> Value:
    return e.op("Not", e.op("Equal", *_operands(e, node, *node.args[:2])))


def _reversed_sub(e: Emission, node: fx.Node) -> Value:
    a, b = _operands(e, node, node.args[0], node.args[1])
    return e.op("Sub", b, a)


def _square(e: Emission, node: fx.Node) -> Value:
    x = e.read(first(node), node)
    return e.op("Mul", x, x)


def _inverse_root(e: Emission, node: fx.Node) -> Value:
    return e.op("Reciprocal", e.op("Sqrt", e.read(first(node), node)))


def _clamp(*bounds: str) -> Emitter:
    kinds = {"min": "Max", "max": "Min"}  # a lower bound is a maximum

    def emit(e: Emission, node: fx.Node) -> Value:
        x = e.read(first(node), node)
        for i, name in enumerate(bounds):
            bound = argument(node, 1 + i, name)
            if bound is not None:
                _, b = _operands(e, node, first(node), bound)
                x = e.op(kinds[name], x, b)
        return x

    return emit


def _where(e: Emission, node: fx.Node) -> Value:
    condition, *branches = node.args
    if len(branches) != 2 or not isinstance(condition, fx.Node):
        raise UnsupportedError("where without two branches")
    return e.op("Where", e.read(condition, node), *_operands(e, node, *branches))


def _matmul(e: Emission, node: fx.Node) -> Value:
    return e.op("MatMul", *_operands(e, node, node.args[0], argument(node, 1, "other")))


def _einsum(e: Emission, node: fx.Node) -> Value:
    equation, *values = node.args
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        values = list(values[0])
    return e.op("Einsum", *_operands(e, node, *values), equation=str(equation).replace(" ", ""))


def _attention(e: Emission, node: fx.Node) -> Value:
    """softmax(q k^T / sqrt(d)) v."""
    mask = argument(node, 3, "attn_mask")
    if argument(node, 5, "is_causal", False) or node.kwargs.get("enable_gqa"):
        raise UnsupportedError("causal or grouped attention")
    q, k, v = _operands(e, node, *node.args[:3])
    width = facts.SHAPE.of(first(node))[-1]
    scale: Any = node.kwargs.get("scale") or 1 / math.sqrt(width)
    last = rank(first(node)) - 1
    turned = e.op("Transpose", k, perm=[*range(last - 1), last, last - 1])
    scores = e.op("Mul", e.op("MatMul", q, turned), e.scalar(scale))
    if mask is not None:
        if facts.DTYPE.get(mask) is not torch.float32:
            raise UnsupportedError("attention mask that is not float32")
        scores = e.op("Add", scores, e.read(mask, node))
    return e.op("MatMul", e.op("Softmax", scores, axis=-1), v)


def _floor_division(e: Emission, node: fx.Node) -> Value:
    a, b = _operands(e, node, *node.args[:2])
    quotient = e.op("Div", a, b)
    whole = all(not facts.DTYPE.known(n) for n in node.all_input_nodes)  # sizes: not negative
    return quotient if whole else e.op("Floor", quotient)


def _cast(e: Emission, node: fx.Node) -> Value:
    x, dtype = e.read(first(node), node), facts.DTYPE.get(node)
    if dtype is None:
        raise UnsupportedError("conversion of a number")
    return x if dtype is facts.DTYPE.get(first(node)) else e.cast(x, dtype)


# ------------------------------------------------------------------------------------ reductions


def _reduction(kind: str) -> Emitter:
    def emit(e: Emission, node: fx.Node) -> Value:
        if node.kwargs.get("dtype") is not None or len(node.args) > 3:
            raise UnsupportedError("a reduction in another type")
        dims, keep = argument(node, 1, "dim"), bool(argument(node, 2, "keepdim", False))
        over, x = axes(node, dims), e.read(first(node), node)
        if kind == "ReduceMean" and rank(first(node)) == 4 and sorted(over) == [2, 3]:
            pooled = e.op("GlobalAveragePool", x)
            # rounded before it is flattened, so that the pooling kernel is an int8 one
            return pooled if keep else e.op("Flatten", e.rounded(pooled, node), axis=1)
        return e.op(kind, x, e.ints(over), keepdims=int(keep))

    return emit


def _extreme(kind: str) -> Emitter:
    """``max`` and ``min`` of everything, of a dimension (values and places), or of two tensors."""

    def emit(e: Emission, node: fx.Node) -> Value:
        other = argument(node, 1, "dim", node.kwargs.get("other"))
        x = e.read(first(node), node)
        if isinstance(other, fx.Node):
            return e.op(kind, *_operands(e, node, first(node), other))
        if other is None:
            return e.op(f"Reduce{kind}", x, keepdims=0)
        keep, (axis,) = int(bool(argument(node, 2, "keepdim", False))), axes(node, other)
        places = e.op(f"Arg{kind}", x, axis=axis, keepdims=keep)
        return e.op(f"Reduce{kind}", x, e.ints([axis]), keepdims=keep), places

    return emit


def _arg_extreme(kind: str) -> Emitter:
    def emit(e: Emission, node: fx.Node) -> Value:
        dim = argument(node, 1, "dim")
        if dim is None:
            raise UnsupportedError("place of an extreme of everything")
        keep, (axis,) = int(bool(argument(node, 2, "keepdim", False))), axes(node, dim)
        return e.op(kind, e.read(first(node), node), axis=axis, keepdims=keep)

    return emit


def _top(e: Emission, node: fx.Node) -> Value:
    count, dim = argument(node, 1, "k"), argument(node, 2, "dim", -1)
    largest = int(bool(argument(node, 3, "largest", True)))
    x = e.read(first(node), node)
    (axis,) = axes(node, dim)
    return e.op_many("TopK", [x, e.ints([count])], 2, axis=axis, largest=largest)


def _layer_norm(e: Emission, node: fx.Node) -> Value:
    """A layer norm without a scale or a shift of its own (one with both is a module)."""
    shape: Any = argument(node, 1, "normalized_shape")
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    x = e.read(first(node), node)
    names = [e.read(weight) if weight is not None else e.constant(torch.ones(*shape), "weight")]
    if bias is not None:
        names.append(e.read(bias))
    epsilon = argument(node, 4, "eps", 1e-5)
    return e.op("LayerNormalization", x, *names, axis=-len(shape), epsilon=epsilon)


def _softmax(kind: str) -> Emitter:
    def emit(e: Emission, node: fx.Node) -> Value:
        dim = argument(node, 1, "dim")
        if dim is None or node.kwargs.get("dtype") is not None:
            raise UnsupportedError("softmax without a dimension or in another type")
        return e.op(kind, e.read(first(node), node), axis=dim)

    return emit


ARITHMETIC: dict[str, Emitter] = {
    "abs": _unary("Abs"),
    "add": _binary("Add"),
    "amax": _reduction("ReduceMax"),
    "amin": _reduction("ReduceMin"),
    "argmax": _arg_extreme("ArgMax"),
    "argmin": _arg_extreme("ArgMin"),
    "ceil": _unary("Ceil"),
    "cos": _unary("Cos"),
    "div": _binary("Div"),
    "einsum": _einsum,
    "eq": _binary("Equal"),
    "erf": _unary("Erf"),
    "exp": _unary("Exp"),
    "floor": _unary("Floor"),
    "floordiv": _floor_division,
    "ge": _binary("GreaterOrEqual"),
    "gt": _binary("Greater"),
    "le": _binary("LessOrEqual"),
    "layer_norm": _layer_norm,
    "log": _unary("Log"),
    "log_softmax": _softmax("LogSoftmax"),
    **dict.fromkeys(("logical_and", "and_", "bitwise_and"), _logical("And")),
    **dict.fromkeys(("logical_or", "or_", "bitwise_or"), _logical("Or")),
    **dict.fromkeys(("logical_not", "invert", "bitwise_not"), _logical("Not")),
    "lt": _binary("Less"),
    "max": _extreme("Max"),
    "maximum": _binary("Max"),
    "mean": _reduction("ReduceMean"),
    "min": _extreme("Min"),
    "minimum": _binary("Min"),
    "mul": _binary("Mul"),
    "ne": _not_equal,
    "neg": _unary("Neg"),
    "pow": _binary("Pow"),
    "reciprocal": _unary("Reciprocal"),
    "round": _unary("Round"),
    "rsqrt": _inverse_root,
    "rsub": _reversed_sub,
    "scaled_dot_product_attention": _attention,
    "sigmoid": _unary("Sigmoid"),
    "sign": _unary("Sign"),
    "sin": _unary("Sin"),
    "softmax": _softmax("Softmax"),
    "sqrt": _unary("Sqrt"),
    "square": _square,
    "sub": _binary("Sub"),
    "sum": _reduction("ReduceSum"),
    "tanh": _unary("Tanh"),
    "topk": _top,
    "truediv": _binary("Div"),
    "where": _where,
    **dict.fromkeys(("clamp", "clip"), _clamp("min", "max")),
    "clamp_max": _clamp("max"),
    "clamp_min": _clamp("min"),
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    **dict.fromkeys(("to", "float", "long", "int", "double", "bool", "type_as"), _cast),
}
