"""How the functions and methods of a canonical graph are written in ONNX."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from rewriter.int8.emission import Emission, UnsupportedError, Value, argument
from rewriter.int8.onnx_modules import pad

Emitter = Callable[[Emission, fx.Node], Value]

_UNARY = {
    "abs": "Abs",
    "ceil": "Ceil",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "logical_not": "Not",
    "neg": "Neg",
    "reciprocal": "Reciprocal",
    "round": "Round",
    "sigmoid": "Sigmoid",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
}
_BINARY = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "truediv": "Div",
    "div": "Div",
    "maximum": "Max",
    "minimum": "Min",
    "pow": "Pow",
    "eq": "Equal",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
    "lt": "Less",
    "le": "LessOrEqual",
    "logical_and": "And",
    "logical_or": "Or",
}
_REDUCTIONS = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin"}
_TO_THE_END = sys.maxsize


# ----------------------------------------------------------------------------------- arguments


def _first(node: fx.Node) -> fx.Node:
    if not node.args or not isinstance(node.args[0], fx.Node):
        raise UnsupportedError("first argument is no value of the graph")
    return node.args[0]


def _rank(node: fx.Node) -> int:
    shape = node.meta.get("shape")
    if not isinstance(shape, tuple) or (shape and not isinstance(shape[0], int)):
        raise UnsupportedError(f"{node.name} is not one tensor")
    return len(shape)


def _list(node: fx.Node, start: int, name: str) -> list[Any]:
    """Numbers given as separate arguments, as one list, or by name."""
    rest: Any = node.args[start:] or node.kwargs.get(name, ())
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        rest = rest[0]
    return list(rest)


def _axes(node: fx.Node, dims: Any) -> list[int]:
    rank = _rank(_first(node))
    if dims is None or dims == () or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def _example(value: Any) -> Any:
    """What torch's type promotion needs to know of an operand."""
    if not isinstance(value, fx.Node):
        return value
    dtype = value.meta.get("dtype")
    return 1 if dtype is None else torch.empty((1,) * _rank(value), dtype=dtype)


def _operands(e: Emission, node: fx.Node, *operands: Any, real: bool = False) -> Iterator[str]:
    """Tensors or numbers as ONNX tensors of the one type that torch computes in."""
    examples = [_example(o) for o in operands]
    if len(examples) == 1:
        examples *= 2
    dtype = torch.result_type(*examples)
    if real and not dtype.is_floating_point:
        dtype = torch.float32
    for o in operands:
        if isinstance(o, fx.Node):
            x = e.read(o, node)
            yield x if o.meta.get("dtype", torch.int64) is dtype else e.cast(x, dtype)
        elif isinstance(o, (bool, int, float)):
            yield e.scalar(o, dtype)
        else:
            raise UnsupportedError(f"operand of type {type(o).__name__}")


# ------------------------------------------------------------------------------------ arithmetic


def _unary(kind: str) -> Emitter:
    return lambda e, node: e.op(kind, e.read(_first(node), node))


def _binary(kind: str) -> Emitter:
    def emit(e: Emission, node: fx.Node) -> Value:
        if node.kwargs.keys() - {"alpha", "other"}:
            raise UnsupportedError(f"arguments {sorted(node.kwargs)}")
        real = kind == "Div"
        a, b = _operands(e, node, node.args[0], argument(node, 1, "other"), real=real)
        factor = node.kwargs.get("alpha", 1)
        if factor != 1:
            b = e.op("Mul", b, e.scalar(factor))  # type: ignore[arg-type]
        return e.op(kind, a, b)

    return emit


def _not_equal(e: Emission, node: fx.Node) -> Value:
    return e.op("Not", e.op("Equal", *_operands(e, node, *node.args[:2])))


def _reversed_sub(e: Emission, node: fx.Node) -> Value:
    a, b = _operands(e, node, node.args[0], node.args[1])
    return e.op("Sub", b, a)


def _square(e: Emission, node: fx.Node) -> Value:
    x = e.read(_first(node), node)
    return e.op("Mul", x, x)


def _inverse_root(e: Emission, node: fx.Node) -> Value:
    return e.op("Reciprocal", e.op("Sqrt", e.read(_first(node), node)))


def _clamp(e: Emission, node: fx.Node) -> Value:
    x = e.read(_first(node), node)
    names = ("min",) if node.target == "clamp_min" or node.target is torch.clamp_min else ()
    names = ("max",) if node.target == "clamp_max" or node.target is torch.clamp_max else names
    for i, name in enumerate(names or ("min", "max")):
        bound = argument(node, 1 + i, name)
        if bound is not None:
            _, b = _operands(e, node, _first(node), bound)
            x = e.op("Max" if name == "min" else "Min", x, b)
    return x


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
    width = _first(node).meta["shape"][-1]
    scale = node.kwargs.get("scale") or 1 / math.sqrt(width)
    rank = _rank(_first(node))
    turned = e.op("Transpose", k, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = e.op("Mul", e.op("MatMul", q, turned), e.scalar(scale))
    if mask is not None:
        if mask.meta.get("dtype") is not torch.float32:
            raise UnsupportedError("attention mask that is not float32")
        scores = e.op("Add", scores, e.read(mask, node))
    return e.op("MatMul", e.op("Softmax", scores, axis=-1), v)


# ------------------------------------------------------------------------------------ reductions


def _reduce(e: Emission, node: fx.Node) -> Value:
    kind = _name(node)
    if node.kwargs.get("dtype") is not None:
        raise UnsupportedError("a reduction in another type")
    dims, keep = argument(node, 1, "dim"), bool(argument(node, 2, "keepdim", False))
    axes, x = _axes(node, dims), e.read(_first(node), node)
    if kind == "mean" and _rank(_first(node)) == 4 and sorted(axes) == [2, 3]:
        pooled = e.op("GlobalAveragePool", x)
        return pooled if keep else e.op("Flatten", pooled, axis=1)
    return e.op(_REDUCTIONS[kind], x, e.ints(axes), keepdims=int(keep))


def _extreme(e: Emission, node: fx.Node) -> Value:
    """``max`` and ``min``: of everything, along a dimension (values and places), or of two tensors."""
    kind, other = _name(node), argument(node, 1, "dim", argument(node, 1, "other"))
    x = e.read(_first(node), node)
    if isinstance(other, fx.Node):
        return e.op(kind.capitalize(), *_operands(e, node, _first(node), other))
    reduction = f"Reduce{kind.capitalize()}"
    if other is None:
        return e.op(reduction, x, keepdims=0)
    keep, axis = int(bool(argument(node, 2, "keepdim", False))), _axes(node, other)[0]
    places = e.op(f"Arg{kind.capitalize()}", x, axis=axis, keepdims=keep)
    return e.op(reduction, x, e.ints([axis]), keepdims=keep), places


def _arg_extreme(e: Emission, node: fx.Node) -> Value:
    dim = argument(node, 1, "dim")
    if dim is None:
        raise UnsupportedError("place of an extreme of everything")
    kind = {"argmax": "ArgMax", "argmin": "ArgMin"}[_name(node)]
    keep = int(bool(argument(node, 2, "keepdim", False)))
    return e.op(kind, e.read(_first(node), node), axis=_axes(node, dim)[0], keepdims=keep)


def _top(e: Emission, node: fx.Node) -> Value:
    count, dim = argument(node, 1, "k"), argument(node, 2, "dim", -1)
    largest = int(bool(argument(node, 3, "largest", True)))
    x = e.read(_first(node), node)
    axis = _axes(node, dim)[0]
    return e.op_many("TopK", [x, e.ints([count])], 2, axis=axis, largest=largest)


def _softmax(e: Emission, node: fx.Node) -> Value:
    kind = "LogSoftmax" if _name(node) == "log_softmax" else "Softmax"
    dim = argument(node, 1, "dim")
    if dim is None or node.kwargs.get("dtype") is not None:
        raise UnsupportedError("softmax without a dimension or in another type")
    return e.op(kind, e.read(_first(node), node), axis=dim)


# ----------------------------------------------------------------------------- moving and joining


def _reshape(e: Emission, node: fx.Node) -> Value:
    return e.op("Reshape", e.read(_first(node), node), e.ints(_list(node, 1, "shape")))


def _flatten(e: Emission, node: fx.Node) -> Value:
    source = _first(node)
    rank = _rank(source)
    if rank == 0:
        return e.op("Reshape", e.read(source, node), e.ints([1]))
    start = argument(node, 1, "start_dim", 0) % rank
    stop = argument(node, 2, "end_dim", -1) % rank
    x = e.read(source, node)
    if start == 1 and stop == rank - 1:
        return e.op("Flatten", x, axis=1)
    shape = source.meta["shape"]
    middle = -1 if start == 0 else math.prod(shape[start : stop + 1])
    return e.op("Reshape", x, e.ints([*[0] * start, middle, *shape[stop + 1 :]]))


def _permute(e: Emission, node: fx.Node) -> Value:
    order = [d % _rank(_first(node)) for d in _list(node, 1, "dims")]
    return e.op("Transpose", e.read(_first(node), node), perm=order)


def _transpose(e: Emission, node: fx.Node) -> Value:
    order = list(range(_rank(_first(node))))
    a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    if _name(node) == "t" or node.kwargs.keys() - {"dim0", "dim1"}:
        a, b = 0, 1
    order[a], order[b] = order[b], order[a]
    return e.op("Transpose", e.read(_first(node), node), perm=order)


def _squeeze(e: Emission, node: fx.Node) -> Value:
    source, dims = _first(node), argument(node, 1, "dim")
    shape = source.meta["shape"]
    if dims is None:
        raise UnsupportedError("squeeze without a dimension, which may be the batch")
    axes = [a for a in _axes(node, dims) if shape[a] == 1]
    x = e.read(source, node)
    return e.op("Squeeze", x, e.ints(axes)) if axes else x


def _unsqueeze(e: Emission, node: fx.Node) -> Value:
    axis = argument(node, 1, "dim") % (_rank(_first(node)) + 1)
    return e.op("Unsqueeze", e.read(_first(node), node), e.ints([axis]))


def _expand(e: Emission, node: fx.Node) -> Value:
    sizes = [1 if isinstance(s, int) and s == -1 else s for s in _list(node, 1, "size")]
    return e.op("Expand", e.read(_first(node), node), e.ints(sizes))


def _expand_as(e: Emission, node: fx.Node) -> Value:
    other = argument(node, 1, "other")
    return e.op("Expand", e.read(_first(node), node), e.op("Shape", e.read(other)))


def _repeat(e: Emission, node: fx.Node) -> Value:
    times, x, rank = _list(node, 1, "repeats"), e.read(_first(node), node), _rank(_first(node))
    if len(times) > rank:
        x = e.op("Unsqueeze", x, e.ints(list(range(len(times) - rank))))
    return e.op("Tile", x, e.ints(times))


def _cat(e: Emission, node: fx.Node) -> Value:
    values, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", node.kwargs.get("axis", 0))
    if not isinstance(values, (tuple, list)) or len(values) == 0:
        raise UnsupportedError("joining something that is no list of tensors")
    names = [e.read(v, node) if isinstance(v, fx.Node) else "" for v in values]
    if "" in names or len({v.meta.get("dtype") for v in values}) > 1:
        raise UnsupportedError("joining tensors of several types")
    if _name(node) == "stack":
        axis = dim % (_rank(values[0]) + 1)
        names = [e.op("Unsqueeze", n, e.ints([axis])) for n in names]
        return e.op("Concat", *names, axis=axis)
    return e.op("Concat", *names, axis=dim % _rank(values[0]))


def _split(e: Emission, node: fx.Node) -> Value:
    """``chunk``, ``split`` and ``unbind`` along a dimension that is not the batch."""
    kind, source = _name(node), _first(node)
    unbind = kind == "unbind"
    dim = argument(node, 1 if unbind else 2, "dim", 0) % _rank(source)
    if dim == 0:
        raise UnsupportedError("splitting the batch")
    shapes: Any = node.meta["shape"]
    sizes = [1 if unbind else s[dim] for s in shapes]
    parts = e.op_many("Split", [e.read(source, node), e.ints(sizes)], len(sizes), axis=dim)
    return tuple(e.op("Squeeze", p, e.ints([dim])) for p in parts) if unbind else parts


def _pad(e: Emission, node: fx.Node) -> Value:
    widths: Any = argument(node, 1, "pad")
    mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value")
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    if any(isinstance(w, fx.Node) for w in widths):
        raise UnsupportedError("padding computed in the graph")
    rank = _rank(_first(node))
    begin, end = [0] * rank, [0] * rank
    for i in range(len(widths) // 2):  # torch lists pairs from the last dimension on
        begin[rank - 1 - i], end[rank - 1 - i] = widths[2 * i], widths[2 * i + 1]
    x = e.read(_first(node), node)
    return pad(e, x, begin + end, modes[mode], 0.0 if value is None else float(value))


# -------------------------------------------------------------------------------------- indexing


def _getitem(e: Emission, node: fx.Node) -> Value:
    source, index = _first(node), node.args[1]
    value = e.values[source]
    if isinstance(value, tuple):
        if not isinstance(index, int):
            raise UnsupportedError("a slice of several tensors")
        return value[index]
    steps: list[Any] = list(index) if isinstance(index, (tuple, list)) else [index]
    if Ellipsis in [s for s in steps if not isinstance(s, fx.Node)]:
        at = next(i for i, s in enumerate(steps) if s is Ellipsis)
        used = sum(s is not None for s in steps) - 1
        steps[at : at + 1] = [slice(None)] * (_rank(source) - used)
    return _index(e, e.read(source, node), steps)


def _index(e: Emission, x: str, steps: list[Any]) -> str:
    slices, picks, new, axis, place = [], [], [], 0, 0
    for step in steps:
        if step is None:
            new.append(place)
            place += 1
            continue
        if isinstance(step, slice):
            if step != slice(None):
                slices.append((axis, step))
            place += 1
        elif isinstance(step, int) and not isinstance(step, bool):
            picks.append((axis, step))
        elif isinstance(step, fx.Node) and step.meta.get("dtype") is torch.int64:
            if sum(isinstance(s, fx.Node) for s in steps) > 1 or picks:
                raise UnsupportedError("several index tensors")
            if step.meta["shape"] and len(step.meta["shape"]) > 1:
                raise UnsupportedError("an index tensor with several dimensions")
            x = e.op("Gather", x, e.read(step), axis=axis)
            place += 1
        else:
            raise UnsupportedError(f"index {step!r}")
        axis += 1
    if slices:
        columns = [
            [0 if s.start is None else s.start for _, s in slices],
            [_TO_THE_END if s.stop is None else s.stop for _, s in slices],
            [a for a, _ in slices],
            [1 if s.step is None else s.step for _, s in slices],
        ]
        x = e.op("Slice", x, *[e.ints(c) for c in columns])
    for at, pick in reversed(picks):
        x = e.op("Gather", x, e.constant(np.array(pick, dtype=np.int64), "index"), axis=at)
    return e.op("Unsqueeze", x, e.ints(new)) if new else x


def _index_select(e: Emission, node: fx.Node) -> Value:
    dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
    axis = _axes(node, dim)[0]
    return e.op("Gather", e.read(_first(node), node), e.read(index), axis=axis)


def _gather(e: Emission, node: fx.Node) -> Value:
    dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
    axis = _axes(node, dim)[0]
    return e.op("GatherElements", e.read(_first(node), node), e.read(index), axis=axis)


def _size(e: Emission, node: fx.Node) -> Value:
    dim = argument(node, 1, "dim")
    if dim is None:
        raise UnsupportedError("all sizes at once")
    sizes = e.op("Shape", e.read(_first(node)))
    return e.op("Gather", sizes, e.constant(np.array(dim, dtype=np.int64), "index"), axis=0)


def _floor_division(e: Emission, node: fx.Node) -> Value:
    a, b = _operands(e, node, *node.args[:2])
    quotient = e.op("Div", a, b)
    whole = all("dtype" not in n.meta for n in node.all_input_nodes)  # sizes: not negative
    return quotient if whole else e.op("Floor", quotient)


def _cast(e: Emission, node: fx.Node) -> Value:
    x, dtype = e.read(_first(node), node), node.meta.get("dtype")
    if dtype is None:
        raise UnsupportedError("conversion of a number")
    return x if dtype is _first(node).meta.get("dtype") else e.cast(x, dtype)


_EMITTERS: dict[str, Emitter] = {
    **{name: _unary(kind) for name, kind in _UNARY.items()},
    **{name: _binary(kind) for name, kind in _BINARY.items()},
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("max", "min"), _extreme),
    **dict.fromkeys(("argmax", "argmin"), _arg_extreme),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    **dict.fromkeys(("transpose", "swapaxes", "t"), _transpose),
    **dict.fromkeys(("cat", "stack"), _cat),
    **dict.fromkeys(("split", "chunk", "unbind", "tensor_split"), _split),
    **dict.fromkeys(("to", "float", "long", "int", "double", "bool", "type_as"), _cast),
    "einsum": _einsum,
    "expand": _expand,
    "expand_as": _expand_as,
    "flatten": _flatten,
    "floordiv": _floor_division,
    "gather": _gather,
    "getitem": _getitem,
    "index_select": _index_select,
    "ne": _not_equal,
    "pad": _pad,
    "permute": _permute,
    "repeat": _repeat,
    "reshape": _reshape,
    "rsqrt": _inverse_root,
    "rsub": _reversed_sub,
    "scaled_dot_product_attention": _attention,
    "size": _size,
    "square": _square,
    "squeeze": _squeeze,
    "topk": _top,
    "unsqueeze": _unsqueeze,
    "where": _where,
}


def _functions() -> dict[Any, str]:
    """The callables of torch and operator that have these names; a user's function of the same name is not one."""
    named: dict[Any, str] = {}
    for place in (torch, F, torch.special, torch._C._nn, operator):
        for name in _EMITTERS:
            function = getattr(place, name, None)
            if callable(function) and not isinstance(function, type):
                named[function] = name
    return named


_NAMES = _functions()


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else _NAMES[node.target]


def function_emitter(node: fx.Node) -> Emitter | None:
    """The emitter of a ``call_function`` or ``call_method`` node, None if there is none."""
    if node.op == "call_method":
        return _EMITTERS.get(str(node.target))
    name = _NAMES.get(node.target)
    return None if name is None else _EMITTERS[name]
