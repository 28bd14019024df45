"""Constant affine maps, y = a x + b with one number or one for each channel, folded into a layer.

Batch norms, frozen ones written out as arithmetic, products with a number, layer scale, and the normalization of inputs are
all of this form. In order of preference:

    behind a layer:   W x + c  ->  (a W) x + (a c + b)             also through ReLU, pools and the like, for a > 0 and b = 0
    before layers:    W (a x + b) + c  ->  (W a) x + (W b + c)     zero padding must not come in between, or b must be 0
    elsewhere:        a depthwise 1 x 1 convolution, which has an int8 kernel; one product or one sum with a number stays

In float64: folding in float32 costs a digit for each layer of a deep network. Only where the layer feeds nothing else:
``torch.fx.experimental.optimization.fuse`` silently corrupts a convolution that two batch norms share, and torch folds a
grouped transposed convolution along the wrong axis. Behind the last layer arithmetic is left as it is: it turns outputs into
boxes or scores, in float. Source: Jacob et al., 2018 (arXiv:1712.05877), section 3.2.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import add_module
from rewriter.graph.interpret import propagate_shapes
from rewriter.graph.lookup import is_call, module_of
from rewriter.graph.ops import LAYER_TYPES, NORM_TYPES, types

_HOMOGENEOUS = types(lambda row: row.homogeneous)
_NEGATIONS = (operator.neg, torch.neg, torch.negative, "neg", "negative", "__neg__")


@dataclass(frozen=True)
class Affine:
    """y = a x + b.

    Args:
        source: the value x.
        scale: a, () or (C,), float64; ``shift`` is b.
        axis: the dimension of x that has the C entries; None: they are numbers.
    """

    source: fx.Node
    scale: Tensor
    shift: Tensor
    axis: int | None = None

    def then(self, other: Affine) -> Affine | None:
        """This one, and ``other`` behind it; None where they go along different dimensions."""
        if self.axis is not None and other.axis is not None and self.axis != other.axis:
            return None
        axis = other.axis if self.axis is None else self.axis
        shift = other.scale * self.shift + other.shift
        scale = (other.scale * self.scale).expand_as(shift)
        return Affine(self.source, scale, shift, axis)


def fold_affines(gm: fx.GraphModule) -> None:
    """Fold every constant affine map where that is possible; edits gm in place."""
    gm.recompile()
    propagate_shapes(gm)
    ahead = feeding_layers(gm)
    for node in list(gm.graph.nodes):
        if not node.users and node.op != "output":
            continue  # folded already
        chain = _chain(gm, node)
        if chain is None:
            continue
        nodes, affine = chain
        last = nodes[-1]
        normalized = any(is_call(gm, n, *NORM_TYPES) for n in nodes)
        if _into_layer_before(gm, affine, last) or _into_layers_behind(gm, affine, last):
            if normalized and is_call(gm, affine.source, *LAYER_TYPES):
                facts.FOLDED.put(affine.source, True)
            _bypass(last, affine.source)
        elif last in ahead:
            _stand_alone(gm, nodes, affine)
    for node in gm.graph.find_nodes(op="call_function", target=operator.sub):
        _negate(gm, node, ahead)


def feeding_layers(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes from whose values a layer with weights still computes something."""
    found: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if any(user in found or is_call(gm, user, *LAYER_TYPES) for user in node.users):
            found.add(node)
    return found


# ----------------------------------------------------------------------------------- recognizing


def affine_of(gm: fx.GraphModule, node: Any) -> Affine | None:
    """The affine map that one node is; None if it is none."""
    if not isinstance(node, fx.Node) or not _is_real(node):
        return None
    if is_call(gm, node, *NORM_TYPES):
        return _norm(gm, node)
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    x = node.args[0]
    if node.target in _NEGATIONS and isinstance(x, fx.Node) and _is_value(x):
        return Affine(x, torch.tensor(-1.0).double(), torch.tensor(0.0).double())
    arithmetic = (operator.add, operator.sub, operator.mul, operator.truediv)
    if node.target not in arithmetic or len(node.args) != 2 or node.kwargs:
        return None
    for x, other in (node.args, node.args[::-1]):
        if isinstance(x, fx.Node) and _is_value(x):
            number = _constant(gm, node, x, other)
            if number is not None:
                return _arithmetic(node, x, *number, swapped=x is not node.args[0])
    return None


def _arithmetic(
    node: fx.Node, x: fx.Node, c: Tensor, axis: int | None, swapped: bool
) -> Affine | None:
    one, zero = torch.ones_like(c), torch.zeros_like(c)
    if node.target is operator.add:
        return Affine(x, one, c, axis)
    if node.target is operator.mul:
        return Affine(x, c, zero, axis)
    if node.target is operator.sub:
        return Affine(x, -one, c, axis) if swapped else Affine(x, one, -c, axis)
    if swapped or bool((c == 0).any()):
        return None
    return Affine(x, 1 / c, zero, axis)


def _constant(
    gm: fx.GraphModule, node: fx.Node, x: fx.Node, other: Any
) -> tuple[Tensor, int | None] | None:
    """A number, or one for each entry of one dimension of ``x``, in float64; and that dimension."""
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        return torch.tensor(float(other), dtype=torch.float64), None
    if not isinstance(other, fx.Node) or other.op != "get_attr":
        return None
    value: Any = operator.attrgetter(str(other.target))(gm)
    shape = facts.SHAPE.get(x)
    real = isinstance(value, Tensor) and value.is_floating_point()
    if not real or shape is None or facts.SHAPE.get(node) != shape or value.ndim > len(shape):
        return None
    value = value.detach().double()
    if value.numel() == 1:
        return value.reshape(()), None
    sizes = (1,) * (len(shape) - value.ndim) + tuple(value.shape)
    axes = [i for i, size in enumerate(sizes) if size != 1]
    if len(axes) != 1 or axes[0] == 0:
        return None
    return value.reshape(-1), axes[0]


def _norm(gm: fx.GraphModule, node: fx.Node) -> Affine | None:
    bn, source = module_of(gm, node), node.args[0]
    if bn.running_var is None or not isinstance(source, fx.Node):
        return None
    s = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        s = s * bn.weight.detach().double()
    shift = torch.zeros_like(s) if bn.bias is None else bn.bias.detach().double()
    return Affine(source, s, shift - bn.running_mean.double() * s, 1)


def _is_real(node: fx.Node) -> bool:
    return facts.DTYPE.get(node) is torch.float32


def _is_value(node: fx.Node) -> bool:
    return node.op != "get_attr" and _is_real(node)


def _chain(gm: fx.GraphModule, node: fx.Node) -> tuple[list[fx.Node], Affine] | None:
    """The longest run of affine maps that starts at ``node``, each read by the next alone."""
    affine = affine_of(gm, node)
    if affine is None or (len(affine.source.users) == 1 and _continues(gm, affine, node)):
        return None
    nodes = [node]
    while len(nodes[-1].users) == 1:
        (user,) = nodes[-1].users
        following = affine_of(gm, user)
        longer = None if following is None else affine.then(following)
        if longer is None:
            break
        nodes.append(user)
        affine = longer
    return nodes, affine


def _continues(gm: fx.GraphModule, affine: Affine, node: fx.Node) -> bool:
    """Whether the chain of the node before takes this one in."""
    before = affine_of(gm, affine.source)
    return before is not None and before.then(affine) is not None


# --------------------------------------------------------------------------------------- folding


def _bypass(last: fx.Node, source: fx.Node) -> None:
    """Readers of ``last`` read ``source``; edits the graph."""
    last.replace_all_uses_with(source)
    _erase(last)


def _erase(node: fx.Node) -> None:
    """Erase a node that nobody reads, and what only it read."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        if not source.users and source.op not in ("placeholder", "output"):
            _erase(source)


def _into_layer_before(gm: fx.GraphModule, affine: Affine, last: fx.Node) -> bool:
    """Fold into the layer that makes ``affine.source``; False where there is none that feeds nothing else."""
    node, rank = affine.source, len(facts.SHAPE.of(affine.source))
    scales = bool((affine.scale > 0).all()) and not bool(affine.shift.any())
    while True:
        if len(node.users) != 1:
            return False
        if is_call(gm, node, *LAYER_TYPES):
            break
        inner = node.args[0] if node.args else None
        through = scales and is_call(gm, node, *_HOMOGENEOUS) and isinstance(inner, fx.Node)
        if not through or len(facts.SHAPE.of(inner)) != rank or affine.axis not in (None, 1):  # type: ignore[union-attr]
            return False
        assert isinstance(inner, fx.Node)
        node = inner
    layer = module_of(gm, node)
    outputs = rank - 1 if isinstance(layer, nn.Linear) else 1
    if affine.axis not in (None, outputs):
        return False
    gm.set_submodule(str(node.target), scaled_outputs(layer, affine.scale, affine.shift))
    return True


def _into_layers_behind(gm: fx.GraphModule, affine: Affine, last: fx.Node) -> bool:
    """Fold into the layers that read ``last``; False where anything else reads it."""
    rank = len(facts.SHAPE.of(affine.source))
    for user in last.users:
        if not is_call(gm, user, *LAYER_TYPES):
            return False
        layer = module_of(gm, user)
        inputs = rank - 1 if isinstance(layer, nn.Linear) else 1
        if affine.axis not in (None, inputs):
            return False
        if bool(affine.shift.any()) and not _reads_evenly(layer):
            return False
    for user in last.users:
        layer = module_of(gm, user)
        gm.set_submodule(str(user.target), scaled_inputs(layer, affine.scale, affine.shift))
    return bool(last.users)


def _reads_evenly(layer: Any) -> bool:
    """Whether a constant input gives the same constant everywhere: no zero is padded on."""
    if isinstance(layer, nn.Linear):
        return True
    if isinstance(layer, nn.ConvTranspose2d):
        return False
    none = layer.padding == "valid" or (layer.padding != "same" and not any(layer.padding))
    return none or layer.padding_mode != "zeros"


def scaled_outputs(layer: Any, scale: Tensor, shift: Tensor) -> Any:
    """A copy of ``layer`` that computes scale * layer(x) + shift, () or (C_out,) each."""
    new, weight = copy.deepcopy(layer), layer.weight.detach().double()
    groups = getattr(layer, "groups", 1)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    count = weight.shape[1] * groups if transposed else weight.shape[0]
    scale, shift = scale.expand(count), shift.expand(count)
    if (
        transposed
    ):  # (C_in, C_out / groups, ...): output channel c of group g is entry [inputs of g, c]
        grouped = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
        weight = grouped * scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))
        weight = weight.view_as(layer.weight)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    bias = torch.zeros(count).double() if layer.bias is None else layer.bias.detach().double()
    return _with(
        new, weight, None if layer.bias is None and not shift.any() else bias * scale + shift
    )


def scaled_inputs(layer: Any, scale: Tensor, shift: Tensor) -> Any:
    """A copy of ``layer`` that computes layer(scale * x + shift), () or (C_in,) each."""
    new, weight = copy.deepcopy(layer), layer.weight.detach().double()
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.ConvTranspose2d):
        assert not shift.any()
        return _with(new, weight * scale.expand(len(weight)).view(-1, *[1] * (weight.ndim - 1)))
    inputs = weight.shape[1] * groups
    # (C_out, C_in / groups, ...): the rows of group g read its own input channels
    rows = [
        v.expand(inputs)
        .view(groups, -1)
        .repeat_interleave(len(weight) // groups, 0)
        .view(len(weight), -1, *[1] * (weight.ndim - 2))
        for v in (scale, shift)
    ]
    bias = (
        torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.detach().double()
    )
    added = (weight * rows[1]).flatten(1).sum(1)
    plain = layer.bias is None and not shift.any()
    return _with(new, weight * rows[0], None if plain else bias + added)


def _with(layer: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Edit the layer: set its weight, and its bias unless that is None."""
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer


def _stand_alone(gm: fx.GraphModule, nodes: list[fx.Node], affine: Affine) -> None:
    """What can be folded nowhere becomes a depthwise convolution, or a product or sum with a number."""
    last, shape, before = nodes[-1], facts.SHAPE.of(affine.source), nodes[-1].all_input_nodes
    plain = affine.axis is None and (bool((affine.scale == 1).all()) or not affine.shift.any())
    if plain:
        product = bool((affine.scale != 1).any())
        number = float(affine.scale if product else affine.shift)
        call = operator.mul if product else operator.add
        last.op, last.target, last.args = "call_function", call, (affine.source, number)
    elif len(shape) in (3, 4) and affine.axis in (None, 1):
        kind = nn.Conv2d if len(shape) == 4 else nn.Conv1d
        conv = kind(shape[1], shape[1], 1, groups=shape[1])
        scale, shift = affine.scale.expand(shape[1]), affine.shift.expand(shape[1])
        _with(conv, scale.reshape(conv.weight.shape), shift)
        target = _place(gm, nodes, conv)
        last.op, last.target, last.args = "call_module", target, (affine.source,)
        facts.LAYER.put(last, facts.LAYER.get(last, target))
    else:
        return
    last.kwargs = {}
    for node in before:
        if not node.users and node.op != "placeholder":
            _erase(node)


def _place(gm: fx.GraphModule, nodes: list[fx.Node], conv: nn.Module) -> str:
    """Where the convolution is kept: in the place of a batch norm, or inside the module that does the arithmetic."""
    for node in nodes:
        if node.op == "call_module":
            gm.set_submodule(str(node.target), conv.eval())
            return str(node.target)
    stack = list((facts.MODULE_STACK.get(nodes[-1]) or {}).values())
    owner = str(stack[-1][0]) if stack else ""
    return add_module(gm, f"{owner}.affine" if owner else "affine", conv)


def _negate(gm: fx.GraphModule, node: fx.Node, ahead: set[fx.Node]) -> None:
    """X - layer(y) becomes a sum, for which there is an int8 kernel; edits gm."""
    if node not in ahead or node.kwargs or len(node.args) != 2:
        return
    x, y = node.args
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node) or x is y or not _is_value(x):
        return
    if is_call(gm, y, *LAYER_TYPES) and len(y.users) == 1:
        minus, zero = torch.tensor(-1.0).double(), torch.tensor(0.0).double()
        gm.set_submodule(str(y.target), scaled_outputs(module_of(gm, y), minus, zero))
        node.target = operator.add
