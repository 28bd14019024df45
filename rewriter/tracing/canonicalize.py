"""The normal form of a traced graph, which every rule and both int8 engines rely on.

After ``canonicalize``:

* the network is in eval mode; there is no Identity, Dropout, assertion or in-place operation;
* convolutions, linear layers, batch norms, activations, pools, pads and resizing are
  ``call_module`` nodes of exactly a torch.nn class with one argument, whatever the user wrote
  (functions, methods, keyword arguments, subclasses such as timm's Conv2dSame and
  BatchNormAct2d, which tracing takes apart into a constant pad, a plain convolution, a batch
  norm and an activation);
* activations written by hand are modules too (``rewriter.tracing.recognize_activations``): ``x * sigmoid(x)`` is
  SiLU, ``x * relu6(x + 3) / 6`` is Hardswish, a clamp to [0, 6] is ReLU6;
* what is computed from parameters alone is a buffer, and GLU, SELU and squares are written in operators that have int8
  kernels (``rewriter.tracing.expand_operators``);
* a batch norm, and any other constant affine map of the channels, is folded into a layer before or behind it or becomes a
  depthwise 1 x 1 convolution (``rewriter.tracing.fold_affine``), but for arithmetic behind the last layer;
* a loop over frames is one call on all of them (``rewriter.tracing.join_frame_loops``);
* no module is called twice: each call has a copy (exact in eval mode; modules that change their
  own buffers stay shared and are opaque);
* ``chunk``, ``split`` and ``unbind`` are slices (``operator.getitem``);
* add, sub, mul, div are ``operator`` functions; cat is ``torch.cat(list, dim)``, flatten is
  ``torch.flatten(x, start, end)``, mean is ``torch.mean(x, dims, keepdim)``, all positional
  with dims >= 0; view is ``reshape`` with plain sizes and one -1;
* ``facts.SHAPE``, ``DTYPE`` and ``LAYER`` (the qualified name the user knows) are known of every node.
"""

from __future__ import annotations

import copy
import operator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import add_module
from rewriter.graph.interpret import propagate_shapes
from rewriter.graph.lookup import Opaque, is_call, module_of
from rewriter.graph.ops import LAYER_TYPES, NORM_TYPES, RECURRENT_TYPES, types
from rewriter.tracing.assignment import expand_assignments
from rewriter.tracing.expand_operators import expand_operators, fold_constants
from rewriter.tracing.fold_affine import fold_affines
from rewriter.tracing.functional_to_module import IN_PLACE, SAME, first_argument, module_for
from rewriter.tracing.join_frame_loops import join_loops
from rewriter.tracing.recognize_activations import recognize_activations
from rewriter.tracing.recognize_decomposed import recognize_decomposed
from rewriter.tracing.static_shapes import fix_sizes, plain_dimensions, slices_for_parts

F = nn.functional

_KNOWN = types(lambda row: row.normal)
_DROPOUTS = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_DROPOUT_FUNCTIONS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(F.alpha_dropout, F.feature_alpha_dropout, torch.dropout),
)
_NEUTRAL: dict[Any, int] = {operator.add: 0, operator.sub: 0, operator.mul: 1, operator.truediv: 1}
_CASTS = ("float", "type_as", "type", "to", "cpu", "double")


def canonicalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Bring a freshly traced graph module into the normal form, in place, and return it."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            facts.LAYER.put(node, str(node.target))
    expand_assignments(gm)
    _use_positions(gm)
    _use_plain_functions(gm)
    fold_constants(gm)
    _use_modules(gm)
    gm = join_loops(gm, (*_KNOWN, *_DROPOUTS, nn.Flatten))
    _unshare(gm)
    _plain_classes(gm)
    _remove_nothings(gm)
    _flatten_by_function(gm)
    gm.graph.eliminate_dead_code()  # sizes that nobody uses would count as readers of a value
    gm.recompile()
    propagate_shapes(gm)
    recognize_decomposed(gm)
    expand_operators(gm)
    recognize_activations(gm)
    gm.graph.eliminate_dead_code()
    fold_affines(gm)
    gm.graph.eliminate_dead_code()
    fix_sizes(gm)
    slices_for_parts(gm)
    plain_dimensions(gm)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    _drop_unused_tensors(gm)
    gm.recompile()
    gm.eval()
    propagate_shapes(gm)
    _name_opaque(gm)
    return gm


def _use_positions(gm: fx.GraphModule) -> None:
    """Give every node its first argument by position, and open what works in place.

    Whoever read an overwritten value reads the result already (``rewriter.tracing.tracer``).
    """
    for node in gm.graph.nodes:
        first_argument(node)
        if node.op == "call_module" and hasattr(module_of(gm, node), "inplace"):
            module_of(gm, node).inplace = False
        if node.op not in ("call_function", "call_method"):
            continue
        if "inplace" in node.kwargs:
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        node.target = IN_PLACE.get(node.target, node.target)
        name = str(node.target)
        if node.op != "call_method" or not name.endswith("_") or name.endswith("__"):
            continue
        if hasattr(Tensor, name[:-1]):
            node.target = name[:-1]
        elif name in ("fill_", "zero_"):
            node.op, node.target = "call_function", torch.full_like
            node.args = (*node.args, 0.0)[:2]
        elif name == "copy_":
            node.target, node.args = "expand_as", (node.args[1], node.args[0])
        else:  # random_ and the like work on a copy
            with gm.graph.inserting_before(node):
                copied = gm.graph.call_function(torch.clone, (node.args[0],))
            node.args = (copied, *node.args[1:])


def _use_plain_functions(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if node.target in SAME and not node.kwargs.get("rounding_mode"):
            if node.kwargs.get("alpha", 1) != 1:
                continue
            node.op, node.target = "call_function", SAME[node.target]
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "alpha"}
            if "other" in node.kwargs:
                node.args, node.kwargs = (*node.args, node.kwargs["other"]), {}
        elif node.target in ("__rsub__", "rsub", "__rtruediv__", "__rdiv__") or (
            node.target is torch.rsub and not node.kwargs
        ):
            division = "div" in str(node.target)
            node.op, node.target = "call_function", operator.truediv if division else operator.sub
            node.args = (node.args[1], node.args[0])
        elif node.op == "call_method" and node.target in ("view", "view_as", "reshape_as"):
            node.target = "reshape" if node.target == "view" else "reshape_as"
        elif node.target is torch.reshape:
            node.op, node.target = "call_method", "reshape"
            sizes = node.args[1] if len(node.args) > 1 else node.kwargs["shape"]
            sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)
            node.args, node.kwargs = (node.args[0], *sizes), {}
        elif node.target in (torch.permute, torch.transpose):
            node.op, node.target = "call_method", node.target.__name__


def _use_modules(gm: fx.GraphModule) -> None:
    """Functions and methods that have a module of the same meaning become that module."""
    for node in list(gm.graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        found = module_for(node, lambda n: _constant(gm, n))
        if found is None:
            continue
        module, word = found
        stack = list((facts.MODULE_STACK.get(node) or {}).values())
        owner = str(stack[-1][0]) if stack else ""
        plain = isinstance(module, (*LAYER_TYPES, *NORM_TYPES)) and _free(gm, owner, node)
        target = owner if plain else add_module(gm, _path_for(gm, owner, word), module)
        if plain:
            gm.set_submodule(owner, module)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_module(target, (node.args[0],))
        facts.inherit(new, node)
        facts.LAYER.put(new, owner if plain or owner else target)
        node.replace_all_uses_with(new)
        parameters = [n for n in node.all_input_nodes if n.op == "get_attr"]
        gm.graph.erase_node(node)
        for parameter in parameters:
            if not parameter.users:
                gm.graph.erase_node(parameter)


def _path_for(gm: fx.GraphModule, owner: str, word: str) -> str:
    """Inside the module whose forward made the call; beside it if that is a layer itself."""
    if not owner:
        return word
    module = dict(gm.named_modules()).get(owner)  # gone where nothing of it is used
    layer = module is not None and next(module.parameters(recurse=False), None) is not None
    return f"{owner}_{word}" if layer else f"{owner}.{word}"


def _free(gm: fx.GraphModule, path: str, node: fx.Node) -> bool:
    """Whether the module at ``path`` can be replaced: only ``node`` uses it or a part of it."""
    inside = [
        n
        for n in gm.graph.nodes
        if n.op in ("call_module", "get_attr") and f"{n.target}.".startswith(f"{path}.")
    ]
    return bool(path) and all(n.op == "get_attr" and not set(n.users) - {node} for n in inside)


def _constant(gm: fx.GraphModule, node: Any) -> Tensor | None:
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(gm)
        return value if isinstance(value, Tensor) else None
    return None


def _unshare(gm: fx.GraphModule) -> None:
    """A module called twice gets a copy for each call; one that is opaque stays shared."""
    seen: set[int] = set()
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = module_of(gm, node)
        if id(module) in seen and isinstance(module, (*_KNOWN, *_DROPOUTS, nn.Flatten)):
            node.target = add_module(gm, str(node.target), copy.deepcopy(module))
        seen.add(id(module))


def _plain_classes(gm: fx.GraphModule) -> None:
    """A subclass of torch.nn that adds nothing to ``forward`` is replaced by the class itself."""
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        m: Any = module_of(gm, node)
        if type(m) is nn.Hardtanh and (m.min_val, m.max_val) == (0, 6):
            gm.set_submodule(str(node.target), nn.ReLU6())
        if type(m) is nn.ConvTranspose2d and (len(node.args) > 1 or node.kwargs):
            _fix_output_padding(gm, node)
        if type(m) in _KNOWN:
            continue
        if type(m) in (nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d):
            m = cast(Any, m)
            plain: Any = nn.Upsample(m.size, m.scale_factor, m.mode, m.align_corners)
            gm.set_submodule(str(node.target), plain)
            continue
        same = (k for k in _KNOWN if type(m).forward is k.forward and isinstance(m, k))
        plain = next(same, None)
        if plain is not None:
            m.__class__ = plain


def _fix_output_padding(gm: fx.GraphModule, node: fx.Node) -> None:
    """``conv(x, output_size=...)`` becomes a fixed output padding."""
    m, size = module_of(gm, node), facts.SHAPE.of(node)[2:]
    before = facts.SHAPE.of(node.all_input_nodes[0])[2:]
    steps = zip(before, m.stride, m.padding, m.dilation, m.kernel_size, strict=True)
    least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in steps]
    m.output_padding = tuple(a - b for a, b in zip(size, least, strict=True))
    node.args, node.kwargs = node.args[:1], {}


def _remove_nothings(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_assert":
            gm.graph.erase_node(node)
        elif _is_nothing(gm, node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _is_nothing(gm: fx.GraphModule, node: fx.Node) -> bool:
    if is_call(gm, node, *_DROPOUTS):
        return True
    if node.op == "call_function" and node.target in _DROPOUT_FUNCTIONS:
        # training is the third argument and true unless the user said otherwise
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return training is False
    if getattr(node.target, "__name__", "") == "stochastic_depth":  # torchvision keeps it a leaf
        return (
            node.args[3] is False if len(node.args) > 3 else not node.kwargs.get("training", True)
        )
    if node.target in _NEUTRAL and len(node.args) == 2 and not node.kwargs:
        return _keeps_value(node)
    if node.op == "call_method" and node.target in _CASTS:
        before = node.args[0]
        return isinstance(before, fx.Node) and facts.DTYPE.get(before) is facts.DTYPE.get(node)
    # clones guard against in-place operations, and there are none left
    clones = ("contiguous", "clone", "detach")
    return (node.op == "call_method" and node.target in clones) or (
        node.target is torch.clone and facts.DTYPE.known(node)
    )


def _keeps_value(node: fx.Node) -> bool:
    """Whether a value is added to 0 or multiplied by 1; ``node.args[0]`` is then the value."""
    value, number = node.args
    if node.target in (operator.add, operator.mul) and isinstance(number, fx.Node):
        value, number = number, value
    if (
        isinstance(number, bool)
        or number != _NEUTRAL[node.target]
        or not isinstance(value, fx.Node)
    ):
        return False
    node.args = (value, number)
    return facts.DTYPE.get(value) is facts.DTYPE.get(node) and facts.DTYPE.known(node)


def _flatten_by_function(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if is_call(gm, node, nn.Flatten, nn.Unflatten):
            m = module_of(gm, node)
            flatten = isinstance(m, nn.Flatten)
            node.op = "call_function" if flatten else "call_method"
            node.target = torch.flatten if flatten else "unflatten"
            last = (m.start_dim, m.end_dim) if flatten else (m.dim, m.unflattened_size)
            node.args = (node.args[0], *last)


def _drop_unused_tensors(gm: fx.GraphModule) -> None:
    """Parameters and buffers that a functional call left behind are no part of the network."""
    called = tuple(f"{n.target}." for n in gm.graph.nodes if n.op == "call_module")
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for path, module in gm.named_modules():
        if f"{path}.".startswith(called):
            continue
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, _ in own:
            if (f"{path}.{name}" if path else name) not in used:
                delattr(module, name)


def _name_opaque(gm: fx.GraphModule) -> None:
    """List every called module outside the normal form in ``meta["opaque"]``."""
    called = {str(n.target): n for n in gm.graph.nodes if n.op == "call_module"}
    opaque = [o for o in facts.OPAQUE.of(gm) if o.name in called]
    names = {o.name for o in opaque}
    for target in called:
        m = gm.get_submodule(target)
        if type(m) not in _KNOWN and target not in names:
            recurrent = isinstance(m, RECURRENT_TYPES)
            reason = (
                "recurrent: kept whole" if recurrent else "no rule or int8 form is known for it"
            )
            opaque.append(Opaque(target, type(m).__name__, reason))
    facts.OPAQUE.put(gm, tuple(opaque))
