"""Split values of a graph by channel: the values that must be split alike, and the surgery that does it.

A *component* is a set of values with the same channels: the outputs of some dense layers (its *entries*) and all that
channel-wise operations (activations, depthwise convolutions, pooling, sums and products of two such values) make of them. It ends at
operations that mix channels: a dense layer becomes a sum over the groups, conv(x) = sum_g conv_g(x_g); anything else reads the channels put
together again in float.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import add_module, is_call, module_of

Groups = list[list[int]]

POINTWISE = (
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
)
_SPATIAL = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d,
    nn.Upsample,
    nn.BatchNorm2d,
)
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
    shape = node.meta.get("shape")
    plain = isinstance(shape, tuple) and len(shape) >= 2 and isinstance(shape[1], int)
    return shape[1] if plain else 0  # type: ignore[index]


def is_dense(gm: fx.GraphModule, node: Any) -> bool:
    """Whether a node is a layer in which every output channel reads every input channel (dimension 1)."""
    if is_call(gm, node, nn.Linear):
        return len(node.meta["shape"]) == 2
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
        if _keeps_channels(gm, value, found.channels):
            inside.add(value)
            for source in value.all_input_nodes:
                if channels_of(source) == found.channels and source.op != "get_attr":
                    join(source)
        elif is_dense(gm, value):
            found.entries.append(value)
        elif not found.blocked:
            found.blocked = f"{value.name}, which is no dense layer's output, has the same channels"
        for user in value.users:
            if _keeps_channels(gm, user, found.channels):
                join(user)
            elif (user, value) not in found.exits:
                found.exits.append((user, value))
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    found.entries.sort(key=order.__getitem__)
    found.inside = sorted(inside, key=order.__getitem__)
    found.exits.sort(key=lambda e: (order[e[0]], order[e[1]]))
    return found


def _keeps_channels(gm: fx.GraphModule, node: fx.Node, channels: int) -> bool:
    """Whether channel i of what a node makes depends on channel i of what it reads, and on nothing else."""
    if channels_of(node) != channels:
        return False
    if node.op == "call_module":
        if is_call(gm, node, nn.Conv2d):
            m = module_of(gm, node)
            return m.groups == m.in_channels == m.out_channels == channels and channels > 1
        source = node.args[0]
        same = isinstance(source, fx.Node) and channels_of(source) == channels
        return same and is_call(gm, node, *POINTWISE, *_SPATIAL)
    if node.op != "call_function":
        return False
    if node.target in _ARITHMETIC:
        rank = len(node.meta["shape"])
        return rank >= 2 and all(_fits(n, rank, channels) for n in node.all_input_nodes)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or channels_of(source) != channels:
        return False
    if node.target is torch.mean:
        axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        axes = axes if isinstance(axes, (tuple, list)) else (axes,)
        rank = len(source.meta["shape"])
        return all(isinstance(a, int) and a % rank > 1 for a in axes)
    return node.target is torch.flatten and len(node.meta["shape"]) == 2


def _fits(node: fx.Node, rank: int, channels: int) -> bool:
    """Whether an argument of an element-wise operation can be split, or be read whole by every group."""
    if node.op == "get_attr":
        return False
    shape = node.meta.get("shape")
    return isinstance(shape, tuple) and len(shape) == rank and shape[1] in (channels, 1)


def int8_values(gm: fx.GraphModule, component: Component) -> list[fx.Node]:
    """Values of a component that exist in int8: all but those that only an activation reads."""
    found: list[fx.Node] = []
    for node in (*component.entries, *component.inside):
        users = list(node.users)
        if not (len(users) == 1 and is_call(gm, users[0], *POINTWISE)):
            found.append(node)
    return found


# ------------------------------------------------------------------------------ surgery


def split_component(
    gm: fx.GraphModule, component: Component, groups: Groups, made_by: str
) -> None:
    """Split every value of a component into ``groups`` of channels; edits gm in place.

    The nodes that are there become those of the first group, under their old names; the other groups' nodes
    and the sums are new.

    Args:
        gm: canonical graph.
        component: what to split, not blocked.
        groups: channel indices of each group; together each channel once.
        made_by: written to ``meta["rewritten_by"]`` of what is changed.
    """
    parts: dict[fx.Node, list[fx.Node]] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}  # an entry that reads the component too has several
    for entry in component.entries:
        parts[entry] = readers[entry] = _split_entry(gm, entry, groups)
    for node in component.inside:
        parts[node] = _split_inside(gm, node, groups, parts)
    restored: dict[fx.Node, fx.Node] = {}
    for user, value in component.exits:
        for reader in readers.get(user, [user]):
            if is_dense(gm, reader):
                total = sum_over_groups(gm, reader, parts[value], groups, made_by)
                for found in parts.values():  # what is split further on is the sum
                    found[:] = [total if v is reader else v for v in found]
            else:
                if value not in restored:
                    restored[value] = join_parts(gm, parts[value], groups, value, made_by)
                reader.replace_input_with(value, restored[value])
    for made in parts.values():
        for node in made:
            node.meta["rewritten_by"] = made_by


def _split_entry(gm: fx.GraphModule, entry: fx.Node, groups: Groups) -> list[fx.Node]:
    layer = module_of(gm, entry)
    made = [entry]
    for i, group in enumerate(groups):
        part = output_part(layer, group)
        if i == 0:
            gm.set_submodule(str(entry.target), part)
        else:
            with gm.graph.inserting_after(made[-1]):
                target = add_module(gm, f"{entry.target}_group{i}", part)
                made.append(gm.graph.call_module(target, entry.args))
    _describe(made, groups, entry)
    return made


def _split_inside(
    gm: fx.GraphModule, node: fx.Node, groups: Groups, parts: dict[fx.Node, list[fx.Node]]
) -> list[fx.Node]:
    module = module_of(gm, node) if node.op == "call_module" else None
    made = [node]
    for i, group in enumerate(groups):
        part = None if module is None else channel_part(module, group)
        if i == 0:
            if part is not None:
                gm.set_submodule(str(node.target), part)
            continue
        args = fx.node.map_arg(node.args, lambda a, i=i: parts[a][i] if a in parts else a)
        with gm.graph.inserting_after(made[-1]):
            if part is not None:
                target = add_module(gm, f"{node.target}_group{i}", part)
                made.append(gm.graph.call_module(target, args))
            else:
                made.append(gm.graph.call_function(node.target, args, dict(node.kwargs)))  # type: ignore[arg-type]
    _describe(made, groups, node)
    return made


def _describe(made: list[fx.Node], groups: Groups, original: fx.Node) -> None:
    """Meta of the parts of a value: shape and channel ranges of each."""
    meta = dict(original.meta)
    for node, group in zip(made, groups, strict=True):
        node.meta = {**meta, "shape": (meta["shape"][0], len(group), *meta["shape"][2:])}
        if "channel_range" in meta:
            node.meta["channel_range"] = tuple(r[group] for r in meta["channel_range"])


def sum_over_groups(
    gm: fx.GraphModule, reader: fx.Node, sources: list[fx.Node], groups: Groups, made_by: str
) -> fx.Node:
    """Replace a dense layer by one for each group of its input channels, and the sum of them; edits gm in place.

    Args:
        gm: canonical graph.
        reader: the dense layer; it becomes the one of the first group.
        sources: the values that hold the groups.
        groups: which input channels of ``reader`` each of them holds, in order.
        made_by: written to ``meta["rewritten_by"]``.

    Returns:
        The sum.
    """
    layer = module_of(gm, reader)
    made = [reader]
    for i, group in enumerate(groups):
        # one bias is enough; the last group has the widest range, and takes it
        part = input_part(layer, group, bias=i == len(groups) - 1)
        if i == 0:
            gm.set_submodule(str(reader.target), part)
            reader.args = (sources[0], *reader.args[1:])
        else:
            with gm.graph.inserting_after(made[-1]):
                target = add_module(gm, f"{reader.target}_part{i}", part)
                made.append(gm.graph.call_module(target, (sources[i],)))
    ranges = dict(reader.meta)  # only the whole sum has the ranges that were seen
    meta = {k: v for k, v in ranges.items() if k != "channel_range"}
    for node in made:
        node.meta = {**meta, "rewritten_by": made_by}
    total, last = made[0], made[-1]
    users = list(reader.users)
    for part in made[1:]:
        with gm.graph.inserting_after(last):
            total = gm.graph.call_function(operator.add, (total, part))
        total.meta = {**meta, "rewritten_by": made_by}
        last = total
    if "channel_range" in ranges:
        total.meta["channel_range"] = ranges["channel_range"]
    for user in users:
        if user not in made:
            user.replace_input_with(reader, total)
    return total


def join_parts(
    gm: fx.GraphModule, made: list[fx.Node], groups: Groups, original: fx.Node, made_by: str
) -> fx.Node:
    """The whole value in the old channel order, put together in float."""
    meta = {k: v for k, v in original.meta.items() if k not in ("shape", "channel_range", "int8")}
    channels = sum(map(len, groups))
    shape = (original.meta["shape"][0], channels, *original.meta["shape"][2:])
    order = torch.argsort(torch.tensor([c for group in groups for c in group]))
    index = f"{original.name}_order"
    gm.register_buffer(index, order)
    last = max(made, key={n: i for i, n in enumerate(gm.graph.nodes)}.__getitem__)
    with gm.graph.inserting_after(last):
        joined = gm.graph.call_function(torch.cat, (list(made), 1))
    with gm.graph.inserting_after(joined):
        order_node = gm.graph.get_attr(index)
    with gm.graph.inserting_after(order_node):
        restored = gm.graph.call_function(torch.index_select, (joined, 1, order_node))
    for new in (joined, restored):
        new.meta = {**meta, "shape": shape, "keep_float": True, "rewritten_by": made_by}
    order_node.meta = {"shape": (channels,), "dtype": torch.int64}
    return restored


# ------------------------------------------------------------------------------ weights


def output_part(layer: nn.Module, channels: list[int]) -> Any:
    """The dense layer that computes only these output channels."""
    return _part(layer, channels, None, layer.bias is not None)


def input_part(layer: nn.Module, channels: list[int], bias: bool) -> Any:
    """The dense layer that reads only these input channels."""
    return _part(layer, None, channels, bias and layer.bias is not None)


def _part(
    layer: nn.Module, outputs: list[int] | None, inputs: list[int] | None, bias: bool
) -> Any:
    transposed = isinstance(layer, nn.ConvTranspose2d)
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    if outputs is not None:
        weight = weight[:, outputs] if transposed else weight[outputs]
    if inputs is not None:
        weight = weight[inputs] if transposed else weight[:, inputs]
    part = copy.copy(layer)  # stride, padding and the rest stay as they are
    part._parameters = dict(layer._parameters)
    part.weight = nn.Parameter(weight.clone(), requires_grad=False)
    values: Tensor | None = layer.bias if bias else None  # type: ignore[assignment]
    if values is not None:
        chosen = values.detach() if outputs is None else values.detach()[outputs]
        part.bias = nn.Parameter(chosen.clone(), requires_grad=False)
    else:
        part.bias = None
    sizes = (weight.shape[0], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[0])
    names = ("in_features", "out_features")
    names = names if isinstance(layer, nn.Linear) else ("in_channels", "out_channels")
    for name, size in zip(names, sizes, strict=True):
        setattr(part, name, int(size))
    return part.eval()


def channel_part(module: nn.Module, channels: list[int]) -> nn.Module:
    """The channel-wise module on these channels alone."""
    part = copy.deepcopy(module)
    count = len(channels)
    if isinstance(part, nn.Conv2d):
        part.in_channels = part.out_channels = part.groups = count
    elif isinstance(part, nn.BatchNorm2d):
        part.num_features = count
    elif isinstance(part, nn.PReLU):
        if part.num_parameters == 1:
            return part
        part.num_parameters = count
    else:
        return part
    for name, tensor in list(part.named_parameters(recurse=False)):
        setattr(part, name, nn.Parameter(tensor.detach()[channels].clone(), requires_grad=False))
    for name, tensor in list(part.named_buffers(recurse=False)):
        if tensor.ndim == 1:
            setattr(part, name, tensor[channels].clone())
    return part.eval()
