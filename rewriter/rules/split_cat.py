"""Convolution of a concatenation -> sum of convolutions.

Before: a, b -> concatenation (one int8 range) -> convolution
After:  a -> convolution_a, b -> convolution_b -> sum

    conv(cat(a, b)) = conv_a(a) + conv_b(b), W = [W_a, W_b] along the input channels

Readers of the concatenation other than dense layers still read it.

Why: a concatenation has one int8 range, that of its widest input, and leaves a narrow input a few
    levels of it. With a path of its own each input keeps its own range.
Exact: yes.
Cost: no MACs; one addition for each input after the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from rewriter.graph import facts
from rewriter.graph.lookup import find
from rewriter.rules._rule import Contract, RewriteRule, Site
from rewriter.surgery.channel_component import channels_of, is_dense, reader_gain
from rewriter.surgery.group_channels import rounding_error
from rewriter.surgery.split_component import sum_over_groups

# The split must take away at least this share of the rounding error.
LEAST_GAIN = 0.1


class SplitCat(RewriteRule):
    """One site for each concatenation of channels that a dense layer reads."""

    name: ClassVar[str] = "split_cat"
    contract: ClassVar[Contract] = "exact"
    free: ClassVar[bool] = True
    stage = "split"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in gm.graph.nodes:
            if node.op == "call_function" and node.target is torch.cat and _dimension(node) == 1:
                yield self.site(node, blocked=_problem(gm, node))

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        node = find(gm, site.anchor)
        sources = _inputs(node)
        groups = _groups(sources)
        for reader in list(node.users):
            if is_dense(gm, reader):
                sum_over_groups(gm, reader, sources, groups, f"{site.rule}@{site.anchor}")
        if not node.users:
            gm.graph.erase_node(node)


def _problem(gm: fx.GraphModule, node: fx.Node) -> str:
    sources = _inputs(node)
    if not any(is_dense(gm, user) for user in node.users):
        return "no convolution or linear layer reads the concatenation"
    if len(sources) < 2 or any(channels_of(n) == 0 for n in sources):
        return "its inputs have no channels"
    known = [facts.CHANNEL_RANGE.get(n) for n in sources]
    if any(r is None or len(r[0]) != channels_of(n) for r, n in zip(known, sources, strict=True)):
        return "no calibrated channel ranges"
    ranges: list[tuple[Tensor, Tensor]] = [r for r in known if r is not None]
    low, high = (torch.cat([r[i] for r in ranges]) for i in (0, 1))
    gains = [reader_gain(gm, user) for user in node.users if is_dense(gm, user)]
    weight = torch.stack([g / g.mean().clamp_min(1e-30) for g in gains]).sum(0)
    whole = rounding_error(low, high, [list(range(len(low)))], weight)
    left = rounding_error(low, high, _groups(sources), weight)
    if left >= (1 - LEAST_GAIN) * whole:  # also where all are zero
        share = left / whole if whole else 1.0
        return f"its inputs' ranges are alike: {share:.0%} of the rounding error is left"
    return ""


def _inputs(node: fx.Node) -> list[fx.Node]:
    tensors: Any = node.args[0] if node.args else node.kwargs["tensors"]
    return list(tensors)


def _groups(sources: list[fx.Node]) -> list[list[int]]:
    """Which channels of the concatenation each input holds."""
    groups: list[list[int]] = []
    start = 0
    for source in sources:
        count = channels_of(source)
        groups.append(list(range(start, start + count)))
        start += count
    return groups


def _dimension(node: fx.Node) -> int:
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return dim % len(facts.SHAPE.of(node))
