"""Which torch.nn module says the same as a function or method call in a traced graph."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from rewriter.graph import facts
from rewriter.graph.ops import ACTIVATION_TYPES, LAYER_TYPES, modules_by_call, types

F = nn.functional

Constant = Callable[[Any], Tensor | None]

SAME: dict[Any, Any] = {
    **dict.fromkeys((torch.add, "add", "__add__", "__radd__"), operator.add),
    **dict.fromkeys((torch.mul, torch.multiply, "mul", "__mul__", "__rmul__"), operator.mul),
    **dict.fromkeys((torch.sub, torch.subtract, "sub", "__sub__"), operator.sub),
    **dict.fromkeys((torch.div, torch.divide, "div", "__truediv__", "__div__"), operator.truediv),
    **dict.fromkeys((torch.concat, torch.concatenate), torch.cat),
    "flatten": torch.flatten,
    "mean": torch.mean,
    "matmul": torch.matmul,
    "__matmul__": torch.matmul,
    operator.matmul: torch.matmul,
}


def _pairs(module: Any) -> dict[Any, Any]:
    """Functions that work in place, with those that do not: relu_ -> relu."""
    names = [n for n in dir(module) if n.endswith("_") and not n.startswith("_")]
    return {getattr(module, n): getattr(module, n[:-1]) for n in names if hasattr(module, n[:-1])}


IN_PLACE: dict[Any, Any] = {
    **_pairs(torch),
    **_pairs(F),
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
    operator.imod: operator.mod,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}

_MODULES = modules_by_call()
_ACTIVATION_TYPES = (*ACTIVATION_TYPES, nn.Softmax)
_POOL_TYPES = types(lambda row: row.channelwise)
_CLAMPS = (torch.clamp, torch.clip, "clamp", "clip")
_AT_LEAST = (torch.clamp_min, "clamp_min")


def module_for(node: fx.Node, constant: Constant) -> tuple[nn.Module, str] | None:
    """The module that computes what ``node`` does from its first argument, and a word for it.

    Args:
        node: a ``call_function`` or ``call_method`` node.
        constant: gives the tensor behind a ``get_attr`` node, None for anything else.

    Returns:
        None where there is none, or where an argument is computed in the graph.
    """
    target = node.target
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    kind = _MODULES.get(target)
    if kind in _ACTIVATION_TYPES:
        return _activation(node, kind)
    if target in _CLAMPS:
        return _clamp(_argument(node, 1, "min"), _argument(node, 2, "max"))
    if target in _AT_LEAST:
        return _clamp(_argument(node, 1, "min"), None)
    if kind in _POOL_TYPES:
        return _pool(node, kind)
    if kind is nn.Linear:
        return _linear(node, constant)
    if kind in LAYER_TYPES:
        assert kind is not None
        return _convolution(node, kind, constant)
    if target in (F.batch_norm, torch.batch_norm):
        return _batch_norm(node, constant)
    if target is F.layer_norm:
        return _layer_norm(node, constant)
    if target is F.prelu:
        weight = constant(_argument(node, 1, "weight"))
        if weight is None:
            return None
        prelu = nn.PReLU(weight.numel())
        prelu.weight = nn.Parameter(weight.detach().clone().flatten(), requires_grad=False)
        return prelu, "act"
    if target is F.pad:
        return _pad(node)
    if target is F.interpolate:
        return _upsample(node)
    if kind is nn.PixelShuffle:
        return nn.PixelShuffle(_argument(node, 1, "upscale_factor")), "shuffle"
    return None


def first_argument(node: fx.Node) -> None:
    """Move a first argument given by keyword to the front; edits the node."""
    if node.args or node.op not in ("call_function", "call_method", "call_module"):
        return
    for name in ("input", "x", "tensors"):
        if name in node.kwargs:
            rest = dict(node.kwargs)
            node.args = (rest.pop(name),)
            node.kwargs = rest
            return


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _symbolic(values: Any) -> bool:
    found: list[fx.Node] = []
    map_arg(values, found.append)
    return bool(found)


def _bound(node: fx.Node, function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments by name, without the first; defaults filled in."""
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def _activation(node: Any, kind: Any) -> tuple[nn.Module, str] | None:
    if _symbolic((node.args[1:], node.kwargs)):
        return None
    names = list(inspect.signature(kind.__init__).parameters)[1:]
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    kept = {k: v for k, v in given.items() if k in names and k != "inplace"}
    if kind is nn.Softmax and (given.get("dtype") is not None or len(node.args) > 2):
        return None
    if kind is nn.Hardtanh and (kept.get("min_val"), kept.get("max_val")) == (0, 6):
        return nn.ReLU6(), "act"
    return kind(**kept), "act"


def _clamp(low: Any, high: Any) -> tuple[nn.Module, str] | None:
    if low == 0 and high == 6:
        return nn.ReLU6(), "act"
    if low == 0 and high is None:
        return nn.ReLU(), "act"
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low < high:
        return nn.Hardtanh(float(low), float(high)), "act"
    return None


def _pool(node: Any, kind: Any) -> tuple[nn.Module, str] | None:
    if _symbolic((node.args[1:], node.kwargs)):
        return None
    names = list(inspect.signature(kind.__init__).parameters)[1:]
    if kind is nn.MaxPool2d:  # the function's order differs from the module's
        names = ["kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"]
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    if given.pop("return_indices", False):
        return None
    stride = given.get("stride")
    if stride is None or stride == []:
        given.pop("stride", None)
    return kind(**given), "pool"


def _convolution(
    node: fx.Node, kind: type[nn.Module], constant: Constant
) -> tuple[nn.Module, str] | None:
    transposed = kind is nn.ConvTranspose2d
    names = ["weight", "bias", "stride", "padding"]
    names += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    weight, bias = constant(given.pop("weight")), given.pop("bias", None)
    if weight is None or (bias is not None and constant(bias) is None) or _symbolic(given):
        return None
    groups: Any = given.get("groups", 1)
    a, b = int(weight.shape[0]), int(weight.shape[1]) * groups
    given = {
        k: (v[0] if len(v) == 1 else tuple(v)) if isinstance(v, (tuple, list)) else v
        for k, v in given.items()
    }
    sizes = (a, b) if transposed else (b, a)
    layer = kind(*sizes, tuple(weight.shape[2:]), bias=bias is not None, **given)
    _set(layer, weight, constant(bias))
    return layer, "conv"


def _linear(node: fx.Node, constant: Constant) -> tuple[nn.Module, str] | None:
    weight, bias = constant(_argument(node, 1, "weight")), _argument(node, 2, "bias")
    if weight is None or weight.ndim != 2 or (bias is not None and constant(bias) is None):
        return None
    layer = nn.Linear(int(weight.shape[1]), int(weight.shape[0]), bias=bias is not None)
    _set(layer, weight, constant(bias))
    return layer, "linear"


def _set(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)


def _batch_norm(node: Any, constant: Constant) -> tuple[nn.Module, str] | None:
    names = ["running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    mean, var = constant(given.get("running_mean")), constant(given.get("running_var"))
    rank = len(facts.SHAPE.get(node.args[0], ()))
    if mean is None or var is None or given.get("training") or rank not in (2, 3, 4):
        return None
    size = len(mean)
    kind = nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d
    bn: Any = kind(size, eps=float(given.get("eps", 1e-5)))
    scale, shift = constant(given.get("weight")), constant(given.get("bias"))
    bn.running_mean, bn.running_var = mean.clone(), var.clone()
    bn.weight = nn.Parameter(torch.ones(size) if scale is None else scale.clone(), False)
    bn.bias = nn.Parameter(torch.zeros(size) if shift is None else shift.clone(), False)
    return bn.eval(), "bn"


def _layer_norm(node: Any, constant: Constant) -> tuple[nn.Module, str] | None:
    given = _bound(node, F.layer_norm)
    weight, bias = constant(given["weight"]), constant(given["bias"])
    if weight is None or bias is None or _symbolic(given["normalized_shape"]):
        return None
    shape: Any = tuple(given["normalized_shape"])
    norm = nn.LayerNorm(shape, given["eps"])
    _set(norm, weight, bias)
    return norm, "norm"


def _pad(node: Any) -> tuple[nn.Module, str] | None:
    pad, mode = _argument(node, 1, "pad"), _argument(node, 2, "mode", "constant")
    value = _argument(node, 3, "value")
    if _symbolic(pad) or mode != "constant" or value not in (None, 0) or len(pad) > 4:
        return None
    sides: Any = (*pad, *[0] * (4 - len(pad)))
    return nn.ZeroPad2d(sides), "pad"


def _upsample(node: Any) -> tuple[nn.Module, str] | None:
    given = _bound(node, F.interpolate)
    if _symbolic(given) or given.get("antialias"):
        return None
    mode, corners = given["mode"], given["align_corners"]
    size, factor = given["size"], given["scale_factor"]
    size = tuple(size) if isinstance(size, (tuple, list)) else size
    factor = tuple(factor) if isinstance(factor, (tuple, list)) else factor
    return nn.Upsample(size, factor, mode, corners, given["recompute_scale_factor"]), "up"
