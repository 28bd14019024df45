"""Which values of a graph must be split alike, and what a rounding error in each of them counts.

A *component* is a set of values with the same channels: the outputs of some dense layers (its
*entries*) and all that channel-wise operations (activations, depthwise convolutions, pooling, sums
and products of two such values) make of them. It ends at
operations that mix channels: a dense layer becomes a sum over the groups, conv(x) = sum_g
conv_g(x_g), or reads the groups concatenated where their ranges have become alike; anything else
reads the channels put together again in float.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import is_call, module_of
from rewriter.graph.ops import ACTIVATION_TYPES, types

_SPATIAL = types(lambda row: row.channelwise)
_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv)


@dataclass
class Component:
    """Values that must be split by the same channels.

    Args:
        channels: how many there are.
        entries: dense layers that make the first values, in graph order.
        inside: channel-wise operations on the values, in graph order.
        exits: (reader, value) where a value is read by something that is not channel-wise.
        blocked: why it cannot be split, "" if it can.
    """

    channels: int
    entries: list[fx.Node] = field(default_factory=list[fx.Node])
    inside: list[fx.Node] = field(default_factory=list[fx.Node])
    exits: list[tuple[fx.Node, fx.Node]] = field(default_factory=list[tuple[fx.Node, fx.Node]])
    blocked: str = ""


# ------------------------------------------------------------------------------ finding


def channels_of(node: fx.Node) -> int:
    """Number of channels (dimension 1) of the value a node makes; 0 if it has none."""
    shape = facts.SHAPE.get(node)
    plain = isinstance(shape, tuple) and len(shape) >= 2 and isinstance(shape[1], int)
    return shape[1] if plain else 0  # type: ignore[index]


def is_dense(gm: fx.GraphModule, node: Any) -> bool:
    """Whether a node is a layer whose every output channel reads every input channel."""
    if is_call(gm, node, nn.Linear):
        return len(facts.SHAPE.of(node)) == 2
    return is_call(gm, node, nn.Conv2d, nn.ConvTranspose2d) and module_of(gm, node).groups == 1


def component_of(gm: fx.GraphModule, entry: fx.Node) -> Component:
    """The component that the output of a dense layer belongs to."""
    found = Component(channels_of(entry))
    values = {entry}
    queue = [entry]
    inside: set[fx.Node] = set()

    def join(value: fx.Node) -> None:
        if value not in values:
            values.add(value)
            queue.append(value)

    while queue:
        value = queue.pop()
        if keeps_channels(gm, value, found.channels):
            inside.add(value)
            for source in value.all_input_nodes:
                if channels_of(source) == found.channels and source.op != "get_attr":
                    join(source)
        elif is_dense(gm, value):
            found.entries.append(value)
        elif not found.blocked:
            found.blocked = (
                f"{value.name}, which is no dense layer's output, has the same channels"
            )
        for user in value.users:
            if keeps_channels(gm, user, found.channels):
                join(user)
            elif (user, value) not in found.exits:
                found.exits.append((user, value))
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    found.entries.sort(key=order.__getitem__)
    found.inside = sorted(inside, key=order.__getitem__)
    found.exits.sort(key=lambda e: (order[e[0]], order[e[1]]))
    return found


def components(gm: fx.GraphModule) -> Iterator[Component]:
    """Every component of a graph, in the order of their first entries."""
    seen: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if is_dense(gm, node) and node not in seen:
            component = component_of(gm, node)
            seen.update(component.entries)
            yield component


def component_at(gm: fx.GraphModule, name: str) -> Component | None:
    """The component whose first entry has this name, the same that ``components`` gives; None where there is none."""
    node = next((n for n in gm.graph.nodes if n.name == name), None)
    if node is None or not is_dense(gm, node):
        return None
    component = component_of(gm, node)
    return component if component.entries[0] is node else None


def keeps_channels(gm: fx.GraphModule, node: fx.Node, channels: int) -> bool:
    """Whether channel i of what a node makes depends on channel i of what it reads alone."""
    if channels_of(node) != channels:
        return False
    if node.op == "call_module":
        if is_call(gm, node, nn.Conv2d):
            m = module_of(gm, node)
            return m.groups == m.in_channels == m.out_channels == channels and channels > 1
        source = node.args[0]
        same = isinstance(source, fx.Node) and channels_of(source) == channels
        return same and is_call(gm, node, *ACTIVATION_TYPES, *_SPATIAL)
    if node.op != "call_function":
        return False
    if node.target in _ARITHMETIC:
        rank = len(facts.SHAPE.of(node))
        return rank >= 2 and all(_fits(n, rank, channels) for n in node.all_input_nodes)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or channels_of(source) != channels:
        return False
    if node.target is torch.mean:
        axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        axes = axes if isinstance(axes, (tuple, list)) else (axes,)
        rank = len(facts.SHAPE.of(source))
        return all(isinstance(a, int) and a % rank > 1 for a in axes)
    return node.target is torch.flatten and len(facts.SHAPE.of(node)) == 2


def _fits(node: fx.Node, rank: int, channels: int) -> bool:
    """Whether an argument can be split, or be read whole by every group."""
    if node.op == "get_attr":
        return False
    shape = facts.SHAPE.get(node)
    return isinstance(shape, tuple) and len(shape) == rank and shape[1] in (channels, 1)


def int8_values(gm: fx.GraphModule, component: Component) -> list[fx.Node]:
    """Values of a component that exist in int8: all but those that only an activation reads."""
    found: list[fx.Node] = []
    for node in (*component.entries, *component.inside):
        users = list(node.users)
        if not (len(users) == 1 and is_call(gm, users[0], *ACTIVATION_TYPES)):
            found.append(node)
    return found


def importance(gm: fx.GraphModule, component: Component) -> dict[fx.Node, Tensor]:
    """What a squared error in each channel of each value counts: (C,) by node.

    It is the error power that arrives at the readers, relative to the power of what they make, if
    errors are
    independent and activations have slope 1: a depthwise convolution multiplies channel c by the
    sum of its squared weights.
    """
    found = {
        n: torch.zeros(component.channels, dtype=torch.float64)
        for n in (*component.entries, *component.inside)
    }
    for reader, value in component.exits:
        if is_dense(gm, reader):
            gain = reader_gain(gm, reader)
            if len(gain) == component.channels:
                found[value] += gain / _power(reader)
        else:
            found[value] += 1 / _power(value)
    for node in reversed(component.inside):
        for source in node.all_input_nodes:
            if source in found:
                found[source] += found[node] * _gain(gm, node, source)
    return found


def joined_values(gm: fx.GraphModule, component: Component, groups: int) -> set[fx.Node]:
    """Values whose groups are better concatenated than summed over at their dense readers.

    A sum rounds ``groups`` outputs and ``groups`` - 2 partial sums in the range of the output; a
    concatenation rounds the value once more in its whole range. Behind a depthwise convolution
    ranges are often alike, and the sum costs more.
    """
    found: set[fx.Node] = set()
    for value in {v for _, v in component.exits}:
        readers = [r for r, v in component.exits if v is value and is_dense(gm, r)]
        if not readers or not all(facts.CHANNEL_RANGE.known(n) for n in (value, *readers)):
            continue
        summed = whole = 0.0
        for reader in readers:
            power = _power(reader)
            summed += (2 * groups - 2) * channels_of(reader) * _span(reader) / power
            whole += float(reader_gain(gm, reader).sum()) * _span(value) / power
        if whole < summed:
            found.add(value)
    # nothing would be left of a split whose every value is concatenated again
    known = {n for n in int8_values(gm, component) if facts.CHANNEL_RANGE.known(n)}
    return set() if found >= known else found


def _span(node: fx.Node) -> float:
    """Squared width of the range of a whole value."""
    low, high = facts.CHANNEL_RANGE.of(node)
    return (float(high.max().clamp_min(0)) - float(low.min().clamp_max(0))) ** 2


def reader_gain(gm: fx.GraphModule, reader: fx.Node) -> Tensor:
    """(C_in,) sum of a dense layer's squared weights on each input channel."""
    layer = module_of(gm, reader)
    axis = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
    rest = [d for d in range(layer.weight.ndim) if d != axis]
    return layer.weight.detach().double().square().sum(rest)


def _gain(gm: fx.GraphModule, node: fx.Node, source: fx.Node) -> Tensor | float:
    """How much the power of an error in ``source`` is multiplied in ``node``, for each channel."""
    if is_call(gm, node, nn.Conv2d):
        return module_of(gm, node).weight.detach().double().square().sum((1, 2, 3))
    if is_call(gm, node, nn.BatchNorm2d):
        m = module_of(gm, node)
        scale = 1.0 if m.weight is None else m.weight.detach().double()
        return scale**2 / (m.running_var.double() + m.eps)
    if is_call(gm, node, nn.AvgPool2d, nn.AdaptiveAvgPool2d) or node.target is torch.mean:
        places = [torch.Size(facts.SHAPE.of(n)[2:]).numel() for n in (node, source)]
        return places[0] / places[1]  # errors average out
    if node.target is operator.mul:
        others = [n for n in node.all_input_nodes if n is not source]
        return _power(others[0]) / 4 if others else 1.0
    return 1.0


def _power(node: fx.Node) -> float:
    """Mean square width of a value's channels; 1 where no ranges are known."""
    if not facts.CHANNEL_RANGE.known(node):
        return 1.0
    low, high = facts.CHANNEL_RANGE.of(node)
    return float((high.clamp_min(0) - low.clamp_max(0)).double().square().mean()) or 1.0
