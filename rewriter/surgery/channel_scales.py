"""Which channels of which values can be scaled together without changing what the network computes.

Multiplying a channel by s > 0 where it is made and dividing by s where it is read keeps the function if everything in
between is homogeneous, f(s x) = s f(x): ReLU, LeakyReLU, PReLU, sums (both terms scaled alike), concatenation, pooling, padding, resizing,
slicing, and a product with a gate (the gate stays as it is). A ReLU6 is homogeneous only for channels that never reach its cap.
Every channel of every value is one variable; those that must have the same scale are united, and those that
something inhomogeneous reads are fixed at 1.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.axes import channel_axes
from rewriter.graph.channel_ranges import range_of
from rewriter.graph.lookup import is_call, layer_name, module_of
from rewriter.graph.ops import clip_bounds, types

HOMOGENEOUS = types(lambda row: row.pointwise and row.homogeneous)
_CHANNELWISE = types(lambda row: row.channelwise and row.homogeneous)


@dataclass
class Channels:
    """The variables of a graph's channels.

    Args:
        of: (C,) variable of each channel, by node name (values without channels are absent).
        fixed: (V,) whether a variable must stay at scale 1, by variable.
        caps: nodes that cut their input off at a number (ReLU6), with that number.
        reasons: why a value is fixed, by node name of the value.
    """

    of: dict[str, Tensor]
    fixed: Tensor
    caps: dict[str, float] = field(default_factory=dict[str, float])
    reasons: dict[str, str] = field(default_factory=dict[str, str])


class _Union:
    """Union-find over channel variables, the smallest index as the root."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.fixed: list[bool] = []

    def new(self, count: int, fixed: bool = False) -> list[int]:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        self.fixed.extend([fixed] * count)
        return list(range(start, start + count))

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def unite(self, a: list[int], b: list[int]) -> None:
        for i, j in zip(a, b, strict=True):
            first, second = sorted((self.root(i), self.root(j)))
            self.parent[second] = first
            self.fixed[first] = self.fixed[first] or self.fixed[second]

    def fix(self, a: list[int]) -> None:
        for i in a:
            self.fixed[self.root(i)] = True

    def all_fixed(self, a: list[int]) -> bool:
        return all(self.fixed[self.root(i)] for i in a)


def scale_variables(gm: fx.GraphModule) -> Channels:
    """Find the variables of a canonical graph."""
    union = _Union()
    of: dict[fx.Node, list[int]] = {}
    found = Channels({}, torch.zeros(0, dtype=torch.bool))
    for node in gm.graph.nodes:
        if node.op == "output":
            for value in node.all_input_nodes:
                if value in of and not union.all_fixed(of[value]):
                    found.reasons.setdefault(value.name, "it is an output of the network")
                union.fix(of.get(value, []))
            continue
        made = _through(gm, node, of, union, found)
        if made is None:
            for value in node.all_input_nodes:
                if value in of and not union.all_fixed(of[value]):
                    found.reasons.setdefault(value.name, f"{_called(gm, node)} reads it")
                    union.fix(of[value])
            made = union.new(_count(node), fixed=True)
        of[node] = made
    roots = [union.root(i) for i in range(len(union.parent))]
    kept = {r: k for k, r in enumerate(dict.fromkeys(roots))}
    found.fixed = torch.tensor([union.fixed[r] for r in kept], dtype=torch.bool)
    axes = channel_axes(gm)
    found.of = {
        n.name: torch.tensor([kept[roots[i]] for i in v])
        for n, v in of.items()
        if v and axes.get(n) == 1  # in a sequence dimension 1 holds no channels
    }
    found.caps = {name: cap for name, cap in found.caps.items() if name in found.of}
    return found


def _count(node: fx.Node) -> int:
    shape = facts.SHAPE.get(node)
    return (
        shape[1]
        if isinstance(shape, tuple) and len(shape) >= 2 and isinstance(shape[1], int)
        else 0
    )


def _called(gm: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{type(module_of(gm, node)).__name__} {layer_name(node)}"
    return getattr(node.target, "__name__", str(node.target))


def _through(
    gm: fx.GraphModule,
    node: fx.Node,
    of: dict[fx.Node, list[int]],
    union: _Union,
    found: Channels,
) -> list[int] | None:
    """The variables of the value ``node`` makes; None where it is not homogeneous."""
    if is_call(gm, node, nn.Conv1d, nn.Conv2d, nn.Linear):
        return _layer(gm, node, union)
    read = [of.get(n, []) for n in node.all_input_nodes]
    if not read or any(len(r) == 0 for r in read):
        return None
    if is_call(gm, node, *HOMOGENEOUS, *_CHANNELWISE):
        return read[0] if _keeps_axis(node) else None
    bounds = clip_bounds(module_of(gm, node)) if node.op == "call_module" else None
    if bounds is not None:
        if bounds[0] != 0.0:
            return None
        found.caps[node.name] = bounds[1]
        return read[0]
    if node.op != "call_function":
        return None
    return _function(gm, node, read, union)


def _layer(gm: fx.GraphModule, node: fx.Node, union: _Union) -> list[int] | None:
    if is_call(gm, node, nn.Linear) and len(facts.SHAPE.of(node)) != 2:
        return None  # its features are not dimension 1
    m = module_of(gm, node)
    if getattr(m, "padding_mode", "zeros") not in ("zeros", "reflect", "replicate", "circular"):
        return None
    return union.new(m.weight.shape[0])


def _keeps_axis(node: fx.Node) -> bool:
    source = node.all_input_nodes[0]
    return (_count(source) == _count(node) and len(facts.SHAPE.of(source)) >= 3) or facts.SHAPE.of(
        source
    ) == facts.SHAPE.of(node)


def _function(
    gm: fx.GraphModule, node: fx.Node, read: list[list[int]], union: _Union
) -> list[int] | None:
    target, count = node.target, _count(node)
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    if target in (operator.add, operator.sub) and len(tensors) == 2:
        if any(
            n.op == "get_attr" or _count(n) != count or _rank(n) != _rank(node) for n in tensors
        ):
            return None
        first, second = (read[node.all_input_nodes.index(t)] for t in tensors)
        union.unite(first, second)
        return first
    if target is operator.mul and len(tensors) == 2 and len(read) == 2:
        if any(_count(n) != count or _rank(n) != _rank(node) for n in tensors):
            return None
        for x, gate in (read, read[::-1]):
            if union.all_fixed(gate):
                return x
        return None
    if target is torch.cat and _dimension(node) == 1:
        return [i for n in node.args[0] for i in read[node.all_input_nodes.index(n)]]  # type: ignore[union-attr]
    if target is torch.flatten and _rank(node) == 2:
        places = count // len(read[0])
        return [i for i in read[0] for _ in range(places)]
    if target is torch.mean:
        axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        axes = axes if isinstance(axes, (tuple, list)) else (axes,)
        rank = _rank(node.all_input_nodes[0])
        spatial = all(isinstance(a, int) and a % rank > 1 for a in axes)
        return read[0] if spatial and _count(node) == len(read[0]) else None
    if target is operator.getitem and _rank(node) == _rank(node.all_input_nodes[0]):
        return _sliced(node.args[1], read[0])
    return None


def _sliced(index: Any, variables: list[int]) -> list[int] | None:
    """The variables that a slice along the channels (and others along other axes) leaves."""
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        if not isinstance(part, slice):
            return None
        if any(isinstance(v, fx.Node) for v in (part.start, part.stop, part.step)):
            return None
    return variables[parts[1]] if len(parts) > 1 else variables


def _rank(node: fx.Node) -> int:
    return len(facts.SHAPE.of(node))


def _dimension(node: fx.Node) -> Any:
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return dim % _rank(node) if isinstance(dim, int) else dim


def known_scales(
    gm: fx.GraphModule, channels: Channels, given: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Logarithms (V,) of scales that are known already, and which variables (V,) stay at them.

    The variables of values without known scales are looked for, and those of what such a layer
    reads, from what is known of them on.

    Args:
        gm: canonical graph.
        channels: its variables.
        given: (C,) logarithms of the scales of values, by node name.
    """
    logs = torch.zeros(len(channels.fixed), dtype=torch.float64)
    known, changed = torch.zeros_like(channels.fixed), torch.zeros_like(channels.fixed)
    for node in gm.graph.nodes:
        variables = channels.of.get(node.name)
        if variables is None:
            continue
        scales = given.get(node.name)
        if scales is not None and scales.shape == variables.shape:
            logs[variables], known[variables] = scales, True
        else:
            weighted = is_call(gm, node, nn.Conv1d, nn.Conv2d, nn.Linear)
            read = node.all_input_nodes if weighted else []
            for value in (node, *read):
                if value.name in channels.of:
                    changed[channels.of[value.name]] = True
    return logs, known & ~changed


def rescale(gm: fx.GraphModule, channels: Channels, scales: Tensor) -> None:
    """Multiply every channel by the scale of its variable, by editing the layers' weights in place.

    Args:
        gm: canonical graph.
        channels: its variables.
        scales: (V,) positive, 1 where the variable is fixed.
    """
    for node in gm.graph.nodes:
        if node.name not in channels.of:
            continue
        made = scales[channels.of[node.name]].double()
        source = node.args[0] if node.args else None
        read = None
        if is_call(gm, node, nn.Conv1d, nn.Conv2d, nn.Linear) and isinstance(source, fx.Node):
            read = (
                scales[channels.of[source.name]].double() if source.name in channels.of else None
            )
            _rescale_layer(module_of(gm, node), made, read)
        _rescale_meta(node, made, read)


def _rescale_layer(layer: Any, made: Tensor, read: Tensor | None) -> None:
    """Multiply the outputs of a layer by ``made`` (C_out,), its inputs being multiplied by ``read`` (C_in,)."""
    weight = layer.weight.detach().double()
    if read is not None:
        weight = weight / _inner(layer, read, weight)
    weight = weight * made.view(-1, *[1] * (weight.ndim - 1))
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    if layer.bias is not None:
        bias = layer.bias.detach().double() * made
        layer.bias = nn.Parameter(bias.to(layer.bias.dtype), requires_grad=False)


def _rescale_meta(node: fx.Node, made: Tensor, read: Tensor | None) -> None:
    """What is known of the value is true of the scaled one too."""
    seen = range_of(node, len(made))
    if seen is not None:
        low, high = seen
        facts.CHANNEL_RANGE.put(node, (low * made.to(low), high * made.to(high)))
    known = facts.INFLUENCE.get(node)
    if known is not None and known.shape == made.shape:
        facts.INFLUENCE.put(node, known / made**2)
    known = facts.WEIGHT_INFLUENCE.get(node)
    if known is None:
        return
    groups = 1 if read is None else len(read) // known.shape[1]
    whole = read is None or groups * known.shape[1] == len(read)
    if not whole or not groups or len(known) != len(made) or len(known) % groups:
        facts.WEIGHT_INFLUENCE.drop(node)  # of the layer that a step of the plan has changed since
        return
    known = known / made[:, None] ** 2
    if read is not None:
        rows = read.view(groups, -1)
        known = known * rows.repeat_interleave(len(known) // groups, 0) ** 2
    facts.WEIGHT_INFLUENCE.put(node, known)


def _inner(m: nn.Module, scale: Tensor, weight: Tensor) -> Tensor:
    """Scales of the input channels, shaped to divide the weight (C_out, C_in / groups, ...)."""
    groups: Any = getattr(m, "groups", 1)
    rows = scale.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return rows.view(*rows.shape, *[1] * (weight.ndim - 2))
