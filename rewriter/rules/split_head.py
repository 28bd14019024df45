"""Last convolution before an output -> one for each group of channels with similar ranges.

Before: x -> convolution (O channels, one output range) -> data movement, decoding -> output
After:  x -> k convolutions, each with a range of its own -> concatenation and channel order in
        float -> the same

    y = conv(x) = concat_g(W[g] x + b[g]) in the old order

The concatenation must stay outside the quantized part, since one int8 tensor has one range: it and
all that follows up to the output is left in float. Groups are found by dynamic programming on
calibrated channel ranges (``rewriter.surgery.group_channels``), each channel's error relative to
its own width, so that scores count as much as boxes. ``split_head_auto`` takes the fewest groups
that leave little to gain; ``split_head_named`` takes the groups that the user named,
``facts.HEAD_GROUPS``, {node name: [[channels], ...]}.

Why: a detection head's channels mean different things (box, objectness, classes), and one int8
    range for all of them spends its 256 levels on the widest.
Exact: yes.
Cost: no MACs; k kernel calls instead of one, and the concatenation runs in float.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.channel_ranges import width
from rewriter.graph.edit import add_module
from rewriter.graph.lookup import find, is_call, module_of
from rewriter.int8.annotate import is_decoding, is_layer
from rewriter.rules._rule import Contract, RewriteRule, Site, mark
from rewriter.surgery.group_channels import group_by_range, rounding_error
from rewriter.surgery.split_component import output_part

# A split that takes away less than this share of the rounding error is not worth its launch
# overhead.
LEAST_GAIN = 0.1
# What ``auto`` is content with: this much of the rounding error that a range for each channel
# would leave; and its most groups.
AUTO_ERROR = 2.0
AUTO_GROUPS = 6
AUTO = 0
EXPONENT = 2.0


@dataclass(frozen=True)
class SplitHead(RewriteRule):
    """Split the last layer into ``groups`` (``AUTO``: as few as do) by calibrated range."""

    groups: int = 3
    contract: ClassVar[Contract] = "exact"
    free: ClassVar[bool] = True
    stage: ClassVar[Literal["replace", "split", "thin", "resize"]] = "split"

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"split_head_{self.groups or 'auto'}"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in gm.graph.nodes:
            if not is_call(gm, node, nn.Conv2d, nn.Linear):
                continue
            if is_decoding(gm, node):
                continue
            after = _downstream(node)
            if any(is_layer(gm, n) and not is_decoding(gm, n) for n in after):
                continue  # not a head
            yield self.site(node, blocked=self._problem(gm, node))

    def _problem(self, gm: fx.GraphModule, node: fx.Node) -> str:
        layer = module_of(gm, node)
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            return f"the convolution has {layer.groups} groups"
        channels = layer.weight.shape[0]
        if channels < 2 * max(2, self.groups):
            return f"{channels} channels are too few for {max(2, self.groups)} groups"
        if not facts.CHANNEL_RANGE.known(node):
            return "no calibrated channel ranges"
        if isinstance(layer, nn.Linear) and len(facts.SHAPE.of(node)) != 2:
            return "the linear layer's features are not dimension 1"
        low, high = facts.CHANNEL_RANGE.of(node)
        weight = _importance(low, high)
        whole = rounding_error(low, high, [list(range(channels))], weight)
        groups = self._groups(gm, node)
        left = rounding_error(low, high, groups, weight)
        if left >= (1 - LEAST_GAIN) * whole:  # also where all are zero
            share = left / whole if whole else 1.0
            return f"the ranges are alike: {len(groups)} leave {share:.0%} of the rounding error"
        return ""

    def _groups(self, gm: fx.GraphModule, node: fx.Node) -> list[list[int]]:
        low, high = facts.CHANNEL_RANGE.of(node)
        weight = _importance(low, high)
        if self.groups != AUTO:
            return group_by_range(low, high, self.groups, weight)
        groups = [list(range(len(low)))]
        for count in range(2, min(AUTO_GROUPS, len(low)) + 1):
            if rounding_error(low, high, groups, weight) <= AUTO_ERROR:
                break
            groups = group_by_range(low, high, count, weight)
        return groups

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        node = find(gm, site.anchor)
        split_layer(gm, node, self._groups(gm, node), site)


@dataclass(frozen=True)
class SplitHeadNamed(SplitHead):
    """Split a head into the groups that the user named; no site where there are none."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "split_head_named"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        named = facts.HEAD_GROUPS.get(gm, {})
        yield from (site for site in super().match(gm) if site.anchor in named)

    def _problem(self, gm: fx.GraphModule, node: fx.Node) -> str:
        channels = sorted(c for group in self._groups(gm, node) for c in group)
        if channels and channels != list(range(module_of(gm, node).weight.shape[0])):
            return "the named groups do not hold each channel once"
        return super()._problem(gm, node)

    def _groups(self, gm: fx.GraphModule, node: fx.Node) -> list[list[int]]:
        return [list(group) for group in facts.HEAD_GROUPS.get(gm, {}).get(node.name, [])]


def _importance(low: Tensor, high: Tensor) -> Tensor:
    """(C,) weight of each channel's squared error: one over its width squared, bounded."""
    size = width(low, high).double()
    return size.clamp_min(float(size.max()) * 1e-2 + 1e-30).pow(-EXPONENT)


def split_layer(
    gm: fx.GraphModule, node: fx.Node, groups: list[list[int]], site: Site
) -> list[fx.Node]:
    """Replace ``node`` by a layer for each group and a float concatenation; edits gm in place."""
    layer = module_of(gm, node)
    parts: list[fx.Node] = []
    with gm.graph.inserting_before(node):
        for i, group in enumerate(groups):
            target = add_module(gm, f"{node.target}_group{i}", output_part(layer, group))
            part = gm.graph.call_module(target, node.args)
            facts.inherit(part, node, facts.CHANNEL_RANGE, facts.SHAPE)
            facts.LAYER.put(part, f"{facts.LAYER.get(node, node.target)}_group{i}")
            facts.SHAPE.put(part, _with_channels(facts.SHAPE.of(node), len(group)))
            if facts.CHANNEL_RANGE.known(node):
                low, high = facts.CHANNEL_RANGE.of(node)
                facts.CHANNEL_RANGE.put(part, (low[group], high[group]))
            mark(part, site)
            parts.append(part)
        joined = gm.graph.call_function(torch.cat, (parts, 1))
        order = torch.argsort(torch.tensor([c for group in groups for c in group]))
        index = f"{str(node.target).replace('.', '_')}_order"
        gm.register_buffer(index, order)
        restored = gm.graph.call_function(
            torch.index_select, (joined, 1, gm.graph.get_attr(index))
        )
    for new in (joined, restored):
        facts.inherit(new, node)
        facts.KEEP_FLOAT.put(new, True)
        mark(new, site)
    node.replace_all_uses_with(restored)
    gm.graph.erase_node(node)
    for later in _downstream(restored):
        if later.op != "output":
            facts.KEEP_FLOAT.put(later, True)
    return parts


def _with_channels(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    return (shape[0], channels, *shape[2:])


def _downstream(node: fx.Node) -> list[fx.Node]:
    """Every node that depends on ``node``, in graph order."""
    reached = {node}
    found: list[fx.Node] = []
    later = node.next
    while later.op != "root":
        if any(n in reached for n in later.all_input_nodes):
            reached.add(later)
            found.append(later)
        later = later.next
    return found
