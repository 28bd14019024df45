"""Last convolution before an output -> one convolution for each group of channels with similar ranges.

Before: x -> convolution (O channels, one output range) -> moves, decoding -> output
After:  x -> k convolutions, each with a range of its own -> concatenation and channel order in float -> the same

    y = conv(x)  =  concat_g(W[g] x + b[g]) in the old order      exact, no MACs added

Why: a detection head's channels mean different things (box, objectness, classes), and one int8 range for all
of them spends its 256 levels on the widest. The concatenation must stay outside the quantized part, since one int8 tensor has
one range: it and all that follows up to the output is left in float.
Groups: dynamic programming on calibrated channel ranges (``rewriter.ranges``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx, nn

from rewriter.canonical import add_module
from rewriter.graph import LAYER_TYPES, find, is_call, module_of
from rewriter.ranges import group_by_range, rounding_error
from rewriter.rules._rule import Contract, RewriteRule, Site, mark

# A split that takes away less than this share of the rounding error is not worth its launch overhead.
LEAST_GAIN = 0.1


@dataclass(frozen=True)
class SplitHead(RewriteRule):
    """Split the last convolution or linear layer into ``groups`` by calibrated channel range."""

    groups: int = 3
    contract: ClassVar[Contract] = "exact"
    free: ClassVar[bool] = True
    stage: ClassVar[Literal["replace", "split"]] = "split"

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"split_head_{self.groups}"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in gm.graph.nodes:
            if not is_call(gm, node, nn.Conv2d, nn.Linear):
                continue
            after = _downstream(node)
            if any(is_call(gm, n, *LAYER_TYPES) for n in after):
                continue  # not a head
            yield self.site(node, blocked=self._problem(gm, node))

    def _problem(self, gm: fx.GraphModule, node: fx.Node) -> str:
        layer = module_of(gm, node)
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            return f"the convolution has {layer.groups} groups"
        channels = layer.weight.shape[0]
        if channels < 2 * self.groups:
            return f"{channels} channels are too few for {self.groups} groups"
        if "channel_range" not in node.meta:
            return "no calibrated channel ranges"
        if isinstance(layer, nn.Linear) and len(node.meta["shape"]) != 2:
            return "the linear layer's features are not dimension 1"
        low, high = node.meta["channel_range"]
        whole = rounding_error(low, high, [list(range(channels))])
        left = rounding_error(low, high, group_by_range(low, high, self.groups))
        if left > (1 - LEAST_GAIN) * whole:
            return f"the channels' ranges are alike: {self.groups} ranges leave {left / max(whole, 1e-30):.0%} of the rounding error"
        return ""

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        node = find(gm, site.anchor)
        groups = group_by_range(*node.meta["channel_range"], self.groups)
        split_layer(gm, node, groups, site)


def split_layer(
    gm: fx.GraphModule, node: fx.Node, groups: list[list[int]], site: Site
) -> list[fx.Node]:
    """Replace ``node`` by one layer for each group and a float concatenation in the old order; edits gm."""
    layer = module_of(gm, node)
    parts: list[fx.Node] = []
    meta = {k: v for k, v in node.meta.items() if k not in ("channel_range", "shape")}
    with gm.graph.inserting_before(node):
        for i, group in enumerate(groups):
            target = add_module(gm, f"{node.target}_group{i}", part_of(layer, group))
            part = gm.graph.call_module(target, node.args)
            part.meta = {**meta, "layer": f"{meta.get('layer', node.target)}_group{i}"}
            part.meta["shape"] = _with_channels(node.meta["shape"], len(group))
            if "channel_range" in node.meta:
                part.meta["channel_range"] = tuple(r[group] for r in node.meta["channel_range"])
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
        new.meta = {**node.meta, "keep_float": True}
        mark(new, site)
    node.replace_all_uses_with(restored)
    gm.graph.erase_node(node)
    for later in _downstream(restored):
        if later.op != "output":
            later.meta["keep_float"] = True
    return parts


def part_of(layer: nn.Module, channels: list[int]) -> Any:
    """The layer that computes only these output channels."""
    if isinstance(layer, nn.Linear):
        part: Any = nn.Linear(layer.in_features, len(channels), bias=layer.bias is not None)
    else:
        part = nn.Conv2d(
            layer.in_channels,  # type: ignore[arg-type]
            len(channels),
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,  # type: ignore[arg-type]
        )
    part.weight = nn.Parameter(layer.weight.detach()[channels].clone(), requires_grad=False)  # type: ignore[index]
    if layer.bias is not None:
        part.bias = nn.Parameter(layer.bias.detach()[channels].clone(), requires_grad=False)  # type: ignore[index]
    return part.eval()


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
