"""A program of ``torch.export`` as a module that calls torch's functions instead of ATen's operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from rewriter.errors import TraceError

F = nn.functional
_OPERATORS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
_GUARDS = (
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_guards_fn",
)


def _batch_norm(
    x: Any, w: Any, b: Any, mean: Any, var: Any, _t: Any, momentum: Any, eps: Any, *_: Any
) -> Any:
    return F.batch_norm(x, mean, var, w, b, False, momentum, eps)


def _resized(mode: str) -> Callable[..., Any]:
    def linear(x: Any, size: Any, corners: bool, factors: Any = None, *_: Any) -> Any:
        return F.interpolate(x, size, None if size is not None else factors, mode, corners)

    def nearest(x: Any, size: Any, factors: Any = None, *_: Any) -> Any:
        return F.interpolate(x, size, None if size is not None else factors, mode)

    return nearest if mode.startswith("nearest") else linear


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


# Operators whose arguments are not those of the function of that name.
_SPECIAL: dict[str, Callable[..., Any]] = {
    "batch_norm": _batch_norm,
    "layer_norm": lambda x, shape, w=None, b=None, eps=1e-5, *_: F.layer_norm(x, shape, w, b, eps),
    "group_norm": lambda x, groups, w=None, b=None, eps=1e-5, *_: F.group_norm(
        x, groups, w, b, eps
    ),
    "instance_norm": lambda x, w, b, m, v, s, mo, eps, *_: F.instance_norm(
        x, m, v, w, b, s, mo, eps
    ),
    "dropout": _same,
    "feature_dropout": _same,
    "alpha_dropout": _same,
    "clone": _same,
    "contiguous": _same,
    "alias": _same,
    "detach": _same,
    "lift_fresh_copy": _same,
    "_to_copy": _same,
    "to": lambda x, *_, **__: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x,
    "upsample_nearest1d": _resized("nearest"),
    "upsample_nearest2d": _resized("nearest"),
    "_upsample_nearest_exact2d": _resized("nearest-exact"),
    "upsample_bilinear2d": _resized("bilinear"),
    "upsample_bicubic2d": _resized("bicubic"),
    "sym_size": lambda x, axis: x.shape[axis],
    "select": lambda x, axis, index: x[(slice(None),) * axis + (index,)],
    "slice": lambda x, axis=0, start=None, end=None, step=1: x[
        (slice(None),) * axis
        + (slice(start, None if end is not None and end > 2**60 else end, step),)
    ],
    "index": lambda x, indices: x[tuple(slice(None) if i is None else i for i in indices)],
    "pad": lambda x, pads, mode="constant", value=None: F.pad(x, pads, mode, value),
    "gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "mean": lambda x, dims=None, keep=False, **_: (
        x.mean() if dims is None else torch.mean(x, dims, keep)
    ),
    "hardtanh": lambda x, low=-1.0, high=1.0: F.hardtanh(x, low, high),
    "softmax": lambda x, axis, *_: F.softmax(x, axis),
    "log_softmax": lambda x, axis, *_: F.log_softmax(x, axis),
}


class _Program(nn.Module):
    """Runs the graph of an exported program on its own tensors."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        for number, (name, tensor) in enumerate([*gm.named_parameters(), *gm.named_buffers()]):
            plain = f"{name.replace('.', '_')}_{number}"
            self.names[name] = plain
            value = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(plain, nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(plain, value)
        for node in gm.graph.nodes:
            if node.op == "get_attr" and str(node.target) not in self.names:
                self.names[str(node.target)] = f"constant_{len(self.names)}"
                value = operator.attrgetter(str(node.target))(gm)
                self.register_buffer(self.names[str(node.target)], value.detach().clone())
        self.graph = gm.graph

    def forward(self, *inputs: Any) -> Any:
        values: dict[fx.Node, Any] = {}
        feed = iter(inputs)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "get_attr":
                values[node] = getattr(self, self.names[str(node.target)])
            elif node.op == "output":
                result = map_arg(node.args[0], values.__getitem__)
                return (
                    result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result
                )
            elif _is_guard(node):
                values[node] = None
            else:
                args = map_arg(node.args, values.__getitem__)
                kwargs = map_arg(node.kwargs, values.__getitem__)
                values[node] = function_of(node.target)(*args, **kwargs)
        return None


def _is_guard(node: fx.Node) -> bool:
    return any(word in str(node.target) for word in _GUARDS)


def function_of(target: Any) -> Callable[..., Any]:
    """Torch's own function for an ATen operator.

    Raises:
        TraceError: there is none.
    """
    if not hasattr(target, "_schema"):
        return target
    name = target._schema.name.split("::")[1]
    plain = name.rstrip("_") if not name.startswith("__") else name
    if plain in _OPERATORS:
        return _OPERATORS[plain]
    if plain in _SPECIAL:
        return _SPECIAL[plain]
    for place in (F, torch):
        found = getattr(place, plain, None)
        if callable(found):
            return found
    if hasattr(Tensor, plain):
        return lambda x, *args, **kwargs: getattr(x, plain)(*args, **kwargs)
    raise TraceError(f"exported program: operator {name}: unknown")


def module_of_program(program: Any) -> nn.Module:
    """The network of a ``torch.export.ExportedProgram``, in eval mode.

    Raises:
        TraceError: it has operators of no function of torch; all are named.
    """
    gm = program.module(check_guards=False)
    unknown: set[str] = set()
    for node in gm.graph.nodes:
        if node.op == "call_function" and not _is_guard(node):
            try:
                function_of(node.target)
            except TraceError as error:
                unknown.add(str(error).split(": ")[1])
    if unknown:
        raise TraceError(f"exported program: not known: {', '.join(sorted(unknown))}")
    return _Program(gm).eval()
