"""Split the values of a component (``rewriter.surgery.channel_component``) into groups of channels, in place."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import add_module
from rewriter.graph.lookup import module_of
from rewriter.surgery.channel_component import Component, channels_of, is_dense

Groups = list[list[int]]


def split_component(
    gm: fx.GraphModule,
    component: Component,
    groups: Groups,
    made_by: str,
    joined: Collection[fx.Node] = (),
) -> None:
    """Split every value of a component into ``groups`` of channels; edits gm in place.

    The nodes that are there become those of the first group, under their old names; the other
    groups' nodes and the sums are new.

    Args:
        gm: canonical graph.
        component: what to split, not blocked.
        groups: channel indices of each group; together each channel once.
        made_by: written to ``meta["rewritten_by"]`` of what is changed.
        joined: values whose dense readers read a concatenation of the groups instead of summing
            over them.
    """
    parts: dict[fx.Node, list[fx.Node]] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}  # an entry that reads the component too has several
    for entry in component.entries:
        parts[entry] = readers[entry] = _split_entry(gm, entry, groups)
    for node in component.inside:
        parts[node] = _split_inside(gm, node, groups, parts)
    restored: dict[fx.Node, fx.Node] = {}
    together: dict[fx.Node, fx.Node] = {}
    for user, value in component.exits:
        for reader in readers.get(user, [user]):
            if is_dense(gm, reader) and value in joined:
                if value not in together:
                    together[value] = _concatenate(gm, parts[value], value, made_by)
                order = [c for group in groups for c in group]
                part = input_part(module_of(gm, reader), order, bias=True)
                gm.set_submodule(str(reader.target), part)
                reader.args = (together[value], *reader.args[1:])
                facts.REWRITTEN_BY.put(reader, made_by)
            elif is_dense(gm, reader):
                total = sum_over_groups(gm, reader, parts[value], groups, made_by)
                for found in parts.values():  # what is split further on is the sum
                    found[:] = [total if v is reader else v for v in found]
            else:
                if value not in restored:
                    restored[value] = join_parts(gm, parts[value], groups, value, made_by)
                reader.replace_input_with(value, restored[value])
    for made in parts.values():
        for node in made:
            facts.REWRITTEN_BY.put(node, made_by)


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
        args = fx.map_arg(node.args, partial(_part_of_argument, parts, i))
        with gm.graph.inserting_after(made[-1]):
            if part is not None:
                target = add_module(gm, f"{node.target}_group{i}", part)
                made.append(gm.graph.call_module(target, args))
            else:
                made.append(gm.graph.call_function(node.target, args, dict(node.kwargs)))  # type: ignore[arg-type]
    _describe(made, groups, node)
    return made


def _part_of_argument(
    parts: dict[fx.Node, list[fx.Node]], group: int, argument: fx.Node
) -> fx.Node:
    return parts[argument][group] if argument in parts else argument


def _describe(made: list[fx.Node], groups: Groups, original: fx.Node) -> None:
    """Meta of the parts of a value: shape and channel ranges of each."""
    shape, ranges = facts.SHAPE.of(original), facts.CHANNEL_RANGE.get(original)
    for node, group in zip(made, groups, strict=True):
        facts.inherit(node, original)
        facts.SHAPE.put(node, (shape[0], len(group), *shape[2:]))
        if ranges is not None:
            low, high = ranges
            facts.CHANNEL_RANGE.put(node, (low[group], high[group]))


def sum_over_groups(
    gm: fx.GraphModule, reader: fx.Node, sources: list[fx.Node], groups: Groups, made_by: str
) -> fx.Node:
    """Replace a dense layer by one for each group of its input channels, and their sum, in place.

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
    ranges = facts.CHANNEL_RANGE.get(reader)  # only the whole sum has the ranges that were seen
    facts.CHANNEL_RANGE.drop(reader)
    for node in made:
        facts.inherit(node, reader)
        facts.REWRITTEN_BY.put(node, made_by)
    total, last = made[0], made[-1]
    users = list(reader.users)
    for part in made[1:]:
        with gm.graph.inserting_after(last):
            total = gm.graph.call_function(operator.add, (total, part))
        facts.inherit(total, reader)
        last = total
    if ranges is not None:
        facts.CHANNEL_RANGE.put(total, ranges)
    for user in users:
        if user not in made:
            user.replace_input_with(reader, total)
    return total


def join_parts(
    gm: fx.GraphModule, made: list[fx.Node], groups: Groups, original: fx.Node, made_by: str
) -> fx.Node:
    """The whole value in the old channel order, put together in float."""
    joined = _concatenate(gm, made, original, made_by)
    order = torch.argsort(torch.tensor([c for group in groups for c in group]))
    index = f"{original.name}_order"
    gm.register_buffer(index, order)
    with gm.graph.inserting_after(joined):
        order_node = gm.graph.get_attr(index)
    with gm.graph.inserting_after(order_node):
        restored = gm.graph.call_function(torch.index_select, (joined, 1, order_node))
    facts.KEEP_FLOAT.put(joined, True)
    facts.inherit(restored, joined)
    facts.SHAPE.put(order_node, (len(order),))
    facts.DTYPE.put(order_node, torch.int64)
    return restored


def _concatenate(
    gm: fx.GraphModule, made: list[fx.Node], original: fx.Node, made_by: str
) -> fx.Node:
    """The groups one behind the other."""
    shape = facts.SHAPE.of(original)
    channels = sum(channels_of(n) for n in made)
    last = max(made, key={n: i for i, n in enumerate(gm.graph.nodes)}.__getitem__)
    with gm.graph.inserting_after(last):
        joined = gm.graph.call_function(torch.cat, (list(made), 1))
    facts.inherit(joined, original, facts.CHANNEL_RANGE, facts.INT8)
    facts.SHAPE.put(joined, (shape[0], channels, *shape[2:]))
    facts.REWRITTEN_BY.put(joined, made_by)
    return joined


# ------------------------------------------------------------------------------ weights


def output_part(layer: nn.Module, channels: list[int]) -> Any:
    """The dense layer that computes only these output channels."""
    return _part(layer, channels, None, isinstance(layer.bias, Tensor))


def input_part(layer: nn.Module, channels: list[int], bias: bool) -> Any:
    """The dense layer that reads only these input channels."""
    return _part(layer, None, channels, bias and isinstance(layer.bias, Tensor))


def _part(
    layer: nn.Module, outputs: list[int] | None, inputs: list[int] | None, bias: bool
) -> Any:
    transposed = isinstance(layer, nn.ConvTranspose2d)
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    if outputs is not None:
        weight = weight[:, outputs] if transposed else weight[outputs]
    if inputs is not None:
        weight = weight[inputs] if transposed else weight[:, inputs]
    part: Any = copy.deepcopy(layer)  # stride, padding and the rest stay as they are
    part.weight = nn.Parameter(weight.clone(), requires_grad=False)
    values: Tensor | None = layer.bias if bias else None  # type: ignore[assignment]
    if values is not None:
        chosen = values.detach() if outputs is None else values.detach()[outputs]
        part.bias = nn.Parameter(chosen.clone(), requires_grad=False)
    else:
        part.bias = None
    sizes = (
        (weight.shape[0], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[0])
    )
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
