"""The normal form of a traced graph, which every rule and both int8 engines rely on.

After ``canonicalise``:

* the network is in eval mode; there is no Identity, Dropout, assertion or in-place operation;
* convolutions, linear layers, batch norms, activations, pools, pads and resizing are ``call_module`` nodes of exactly a
  torch.nn class, whatever the user wrote (functions, methods, subclasses such as timm's Conv2dSame and BatchNormAct2d,
  which tracing takes apart into a constant pad, a plain convolution, a batch norm and an activation);
* ``x * sigmoid(x)`` is SiLU and ``x * hardsigmoid(x)`` is Hardswish;
* a batch norm that follows a convolution or linear layer is folded into it; only lone ones remain;
* no module is called twice: each call has a copy (exact in eval mode; modules that change their own buffers stay shared
  and are opaque);
* ``chunk`` and ``split`` are slices (``operator.getitem``);
* add, sub, mul, div are ``operator`` functions, cat is ``torch.cat``, view is ``reshape`` with plain sizes and one -1;
* ``node.meta`` has ``shape``, ``dtype`` and ``layer`` (the qualified name the user knows).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from rewriter.functional import module_for
from rewriter.graph import LAYER_TYPES, RECURRENT_TYPES, Opaque, is_call, module_of, propagate_shapes

_SAME: dict[Any, Any] = {
    **dict.fromkeys(
        (torch.add, operator.iadd, "add", "add_", "__add__", "__radd__"), operator.add
    ),
    **dict.fromkeys((torch.mul, operator.imul, torch.multiply, "mul", "mul_"), operator.mul),
    **dict.fromkeys((torch.sub, operator.isub, "sub", "sub_"), operator.sub),
    **dict.fromkeys((torch.div, operator.itruediv, "div", "div_"), operator.truediv),
    **dict.fromkeys((torch.concat, torch.concatenate), torch.cat),
    "flatten": torch.flatten,
    "mean": torch.mean,
    "matmul": torch.matmul,
    operator.matmul: torch.matmul,
}
_IN_PLACE = (operator.iadd, operator.imul, operator.isub, operator.itruediv)
_NOTHING_METHODS = ("contiguous", "clone", "detach")
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_KNOWN = (
    *LAYER_TYPES,
    *_BATCH_NORMS,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.PReLU,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
    nn.GELU,
    nn.ELU,
    nn.Mish,
    nn.Softplus,
    nn.Softmax,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d,
    nn.Upsample,
    nn.LayerNorm,
    nn.PixelShuffle,
    nn.ChannelShuffle,
)


def canonicalise(gm: fx.GraphModule) -> fx.GraphModule:
    """Bring a freshly traced graph module into the normal form, in place, and return it."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            node.meta["layer"] = str(node.target)
    _open_in_place(gm)
    _use_plain_functions(gm)
    _use_modules(gm)
    _unshare(gm)
    _plain_classes(gm)
    _remove_nothings(gm)
    _flatten_by_function(gm)
    _recognise_gated_activations(gm)
    _fold_batch_norms(gm)
    gm.graph.eliminate_dead_code()
    _fix_sizes(gm)
    _slices_for_parts(gm)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()
    propagate_shapes(gm)
    _name_opaque(gm)
    return gm


def _open_in_place(gm: fx.GraphModule) -> None:
    """Edit gm in place: what an in-place operation overwrote is read from its result afterwards."""
    for node in list(gm.graph.nodes):
        changed = node.args[0] if node.args else None
        if not isinstance(changed, fx.Node):
            continue
        if node.op == "call_module":
            m = module_of(gm, node)
            in_place = bool(getattr(m, "inplace", False))
            if in_place and hasattr(m, "inplace"):
                m.inplace = False  # type: ignore[assignment]
        elif node.op == "call_function":
            in_place = node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))
            if "inplace" in node.kwargs:
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        else:
            name = str(node.target)
            in_place = node.op == "call_method" and name.endswith("_") and name[-2:] != "__"
        if in_place:
            order = {n: i for i, n in enumerate(gm.graph.nodes)}
            for user in list(changed.users):
                if order[user] > order[node]:
                    user.replace_input_with(changed, node)


def _use_plain_functions(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and node.target in _SAME:
            if node.kwargs.get("rounding_mode") or node.kwargs.get("alpha", 1) != 1:
                continue
            node.op, node.target = "call_function", _SAME[node.target]
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "alpha"}
            if "other" in node.kwargs:
                node.args, node.kwargs = (*node.args, node.kwargs["other"]), {}
        elif node.op == "call_method" and node.target in ("view", "view_as", "reshape_as"):
            node.target = {"view": "reshape"}.get(str(node.target), "reshape_as")
        elif node.op == "call_function" and node.target is torch.reshape:
            node.op, node.target = "call_method", "reshape"
            node.args, node.kwargs = (node.args[0], *_size_arguments(node)), {}
        elif node.op == "call_function" and node.target in (torch.permute, torch.transpose):
            method = node.target.__name__
            node.op, node.target = "call_method", method


def _size_arguments(node: fx.Node) -> tuple[Any, ...]:
    sizes = node.args[1] if len(node.args) > 1 else node.kwargs["shape"]
    return tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)


def _use_modules(gm: fx.GraphModule) -> None:
    """Functions and methods that have a module of the same meaning become that module."""
    for node in list(gm.graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        found = module_for(node, lambda n: _constant(gm, n))
        if found is None:
            continue
        module, word = found
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        owner = str(stack[-1][0]) if stack else ""
        plain = isinstance(module, (*LAYER_TYPES, *_BATCH_NORMS)) and _free(gm, owner)
        target = owner if plain else add_module(gm, f"{owner}.{word}" if owner else word, module)
        if plain:
            gm.set_submodule(owner, module)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_module(target, (node.args[0],))
        new.meta = {**node.meta, "layer": owner if plain or owner else target}
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _free(gm: fx.GraphModule, path: str) -> bool:
    """Whether the module at ``path`` can be replaced: nothing in the graph calls it or a part of it."""
    return bool(path) and not any(
        n.op == "call_module" and (str(n.target) + ".").startswith(path + ".")
        for n in gm.graph.nodes
    )


def _constant(gm: fx.GraphModule, node: Any) -> Tensor | None:
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(gm)
        return value if isinstance(value, Tensor) else None
    return None


def add_module(gm: fx.GraphModule, path: str, module: nn.Module) -> str:
    """Add a sub-module at ``path`` (or the next free name like it), in place; return where it is."""
    taken, target, number = set(dict(gm.named_modules())), path, 0
    while target in taken or any(t.startswith(target + ".") for t in taken):
        number += 1
        target = f"{path}_{number}"
    parent = ""
    for part in target.split(".")[:-1]:
        parent = f"{parent}.{part}" if parent else part
        if parent not in taken:
            gm.add_submodule(parent, nn.Module())
    gm.add_submodule(target, module)
    module.train(mode=False)
    return target


def _unshare(gm: fx.GraphModule) -> None:
    """A module called more than once gets a copy for each call; one that has state of its own stays shared."""
    seen: set[int] = set()
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = module_of(gm, node)
        if id(module) in seen and isinstance(module, _KNOWN):
            node.target = add_module(gm, str(node.target), copy.deepcopy(module))
        seen.add(id(module))


def _plain_classes(gm: fx.GraphModule) -> None:
    """A subclass of torch.nn that adds nothing to ``forward`` is replaced by the class itself."""
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        m = module_of(gm, node)
        if type(m) in _KNOWN:
            continue
        if type(m) is nn.UpsamplingNearest2d:
            gm.set_submodule(str(node.target), nn.Upsample(m.size, m.scale_factor, "nearest"))
            continue
        plain = next((k for k in _KNOWN if type(m).forward is k.forward), None)
        if plain is not None and isinstance(m, plain) and not hasattr(m, "parametrizations"):
            m.__class__ = plain


def _remove_nothings(gm: fx.GraphModule) -> None:
    dropouts = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
    functions = (F.dropout, F.dropout2d, F.alpha_dropout)
    for node in list(gm.graph.nodes):
        assertion = node.op == "call_function" and node.target is torch._assert
        nothing = (
            is_call(gm, node, *dropouts)
            or (node.op == "call_method" and node.target in _NOTHING_METHODS)
            or (node.op == "call_method" and node.target in ("float", "type_as"))
            or (node.op == "call_function" and node.target in functions)
        )
        if nothing:
            node.replace_all_uses_with(node.args[0])
        if nothing or assertion:
            gm.graph.erase_node(node)


def _flatten_by_function(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if is_call(gm, node, nn.Flatten, nn.Unflatten):
            m = module_of(gm, node)
            flatten = isinstance(m, nn.Flatten)
            node.op = "call_function" if flatten else "call_method"
            node.target = torch.flatten if flatten else "unflatten"
            last = (m.start_dim, m.end_dim) if flatten else (m.dim, m.unflattened_size)
            node.args = (node.args[0], *last)


def _recognise_gated_activations(gm: fx.GraphModule) -> None:
    """``x * sigmoid(x)`` -> SiLU, ``x * hardsigmoid(x)`` -> Hardswish."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not operator.mul or len(node.args) != 2:
            continue
        for x, gate in (node.args, node.args[::-1]):
            if not is_call(gm, gate, nn.Sigmoid, nn.Hardsigmoid) or gate.args[0] is not x:
                continue
            kind = nn.SiLU if is_call(gm, gate, nn.Sigmoid) else nn.Hardswish
            with gm.graph.inserting_before(node):
                target = add_module(gm, f"{gate.target}_act", kind())
                new = gm.graph.call_module(target, (x,))
            new.meta = {**gate.meta, "layer": gate.meta.get("layer", target)}
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            break


def _fold_batch_norms(gm: fx.GraphModule) -> None:
    """Fold pair by pair, and only where the convolution feeds nothing else.

    ``torch.fx.experimental.optimization.fuse`` corrupts a convolution that two batch norms share.
    """
    for node in list(gm.graph.nodes):
        if not is_call(gm, node, *_BATCH_NORMS):
            continue
        before, bn = node.args[0], module_of(gm, node)
        if not is_call(gm, before, *LAYER_TYPES) or len(before.users) != 1:
            continue
        layer = module_of(gm, before)
        if bn.running_var is None or not _same_axis(layer, before, node):
            continue
        transposed = isinstance(layer, nn.ConvTranspose2d)
        if transposed and layer.groups > 1:
            continue  # torch folds a grouped transposed convolution along the wrong axis
        fold: Callable[..., nn.Module] = (
            fuse_linear_bn_eval
            if isinstance(layer, nn.Linear)
            else lambda c, b: fuse_conv_bn_eval(c, b, transposed)
        )
        gm.set_submodule(str(before.target), fold(_double(layer), _double(bn)).float())
        node.replace_all_uses_with(before)
        gm.graph.erase_node(node)


def _double(m: nn.Module) -> nn.Module:
    """A float64 copy: folding in float32 costs a digit for each layer of a deep network."""
    return copy.deepcopy(m).double()


def _same_axis(layer: nn.Module, before: fx.Node, node: fx.Node) -> bool:
    if not isinstance(layer, nn.Linear):
        return True
    bn = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
    return isinstance(bn, nn.BatchNorm1d)


def _fix_sizes(gm: fx.GraphModule) -> None:
    """``reshape`` gets plain sizes with one -1 for the batch, so that no size is computed in the graph."""
    gm.recompile()
    found: list[dict[str, Any]] = []
    for batch in (2, 3):
        shapes: dict[str, Any] = {}

        class Sizes(fx.Interpreter):
            def run_node(self, n: fx.Node, into: dict[str, Any] = shapes) -> Any:
                value = super().run_node(n)
                into[n.name] = tuple(value.shape) if isinstance(value, Tensor) else None
                return value

        with torch.no_grad():
            Sizes(gm).run(*[torch.zeros(batch, *s) for s in gm.meta["example"]])
        found.append(shapes)
    for node in gm.graph.nodes:
        reshape = node.op == "call_method" and node.target in ("reshape", "reshape_as", "unflatten")
        if not reshape:
            continue
        two, three = found[0][node.name], found[1][node.name]
        varies = [i for i, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
        if len(varies) <= 1:
            node.target = "reshape"
            node.args = (node.args[0], *[-1 if i in varies else s for i, s in enumerate(two)])
            node.kwargs = {}


def _slices_for_parts(gm: fx.GraphModule) -> None:
    """``chunk`` and ``split`` become one slice for each part, so that every value of the graph is a tensor."""
    functions = (torch.chunk, torch.split, torch.tensor_split)
    gm.recompile()
    propagate_shapes(gm)
    for node in list(gm.graph.nodes):
        parts = node.op == "call_method" and node.target in ("chunk", "split", "tensor_split")
        parts |= node.op == "call_function" and node.target in functions
        plain = all(u.target is operator.getitem and isinstance(u.args[1], int) for u in node.users)
        if not parts or not plain:
            continue
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        shapes, start = node.meta["shape"], 0
        dim %= len(shapes[0])
        if dim == 0:
            continue  # the batch
        bounds = []
        for shape in shapes:
            bounds.append((start, start + shape[dim]))
            start += shape[dim]
        for user in list(node.users):
            part = slice(*bounds[user.args[1]])
            user.args = (node.args[0], (*[slice(None)] * dim, part))
        gm.graph.erase_node(node)


def _name_opaque(gm: fx.GraphModule) -> None:
    """Every module outside the normal form is listed in ``meta["opaque"]``; those no longer called are not."""
    called = {str(n.target): n for n in gm.graph.nodes if n.op == "call_module"}
    opaque = [o for o in gm.meta["opaque"] if o.name in called]
    names = {o.name for o in opaque}
    for target in called:
        m = gm.get_submodule(target)
        if type(m) not in _KNOWN and target not in names:
            recurrent = isinstance(m, RECURRENT_TYPES)
            reason = "recurrent: kept whole" if recurrent else "no rule or int8 form is known for it"
            opaque.append(Opaque(target, type(m).__name__, reason))
    gm.meta["opaque"] = tuple(opaque)
