"""Depthwise separable convolution -> one regular convolution.

Before: depthwise k x k (C channels) -> [activation] -> pointwise 1 x 1 (C -> O)
After:  one k x k convolution (C -> O)

    W[o, i] = P[o, i] * D[i]   (O, C, k, k)      b = P @ d + p   (O,)

Without an activation in between both layers are linear and this product is exact: that rule is
``merge_linear_separable``. With an activation, ``merge_separable`` starts from the same product
and is then fitted (``rewriter.fitting.fit``).

Why: a depthwise layer has few weights per channel and channels of very different ranges, which one
    scale holds badly; a regular convolution sums over all of them.
Exact: ``merge_linear_separable`` is; ``merge_separable`` is fitted on calibration inputs.
Cost: k * k * C * O MACs for each output pixel, instead of k * k * C + C * O.
Source: the reverse of the step in Howard et al., 2017 (arXiv:1704.04861).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import fx, nn

from rewriter.graph.lookup import find, is_call, module_of
from rewriter.graph.ops import ACTIVATION_TYPES
from rewriter.rules._rule import Contract, RewriteRule, Site, mark
from rewriter.surgery.layer_chains import bias_or_zero, convolution_like, is_depthwise, weight_of


class MergeSeparable(RewriteRule):
    """Sites with an activation between both convolutions; needs fitting."""

    name: ClassVar[str] = "merge_separable"
    contract: ClassVar[Contract] = "approximate"
    linear: ClassVar[bool] = False

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in gm.graph.nodes:
            if not is_depthwise(gm, node):
                continue
            chain, blocked = _chain(gm, node)
            between = len(chain) > 2
            if blocked and not self.linear:  # report a near miss once, under the general rule
                yield self.site(*chain, blocked=blocked)
            elif not blocked and between != self.linear:
                yield self.site(*chain)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        nodes = [find(gm, name) for name in site.nodes]
        depthwise, pointwise = nodes[0], nodes[-1]
        merged = merged_convolution(module_of(gm, depthwise), module_of(gm, pointwise))
        gm.set_submodule(str(pointwise.target), merged)
        pointwise.args = depthwise.args
        for node in reversed(nodes[:-1]):
            gm.graph.erase_node(node)
        mark(pointwise, site)


class MergeLinearSeparable(MergeSeparable):
    """Sites with nothing in between: the product of both is exact."""

    name: ClassVar[str] = "merge_linear_separable"
    contract: ClassVar[Contract] = "exact"
    linear: ClassVar[bool] = True


def _chain(gm: fx.GraphModule, node: fx.Node) -> tuple[list[fx.Node], str]:
    """The nodes from the depthwise to the pointwise convolution, and what stands in the way."""
    chain = [node]
    depthwise = module_of(gm, node)
    if depthwise.out_channels != depthwise.in_channels:
        return chain, f"depth multiplier is {depthwise.out_channels // depthwise.in_channels}"
    if depthwise.padding_mode != "zeros":
        return chain, f"padding mode is {depthwise.padding_mode}"
    last = node
    for _ in range(2):
        if len(last.users) != 1:
            return chain, f"{last.name} is read by {len(last.users)} nodes"
        last = next(iter(last.users))
        if last.op == "output":
            return chain, "the graph's output follows"
        if is_call(gm, last, nn.Conv2d):
            return [*chain, last], _pointwise_problem(module_of(gm, last))
        if len(chain) > 1 or not is_call(gm, last, *ACTIVATION_TYPES):
            return chain, f"{last.name} stands between the depthwise and the pointwise convolution"
        chain.append(last)
    return chain, f"{last.name} follows, not a pointwise convolution"


def _pointwise_problem(m: Any) -> str:
    if any(k != 1 for k in m.kernel_size):
        return f"the next convolution is {m.kernel_size[0]} x {m.kernel_size[1]}, not 1 x 1"
    if m.groups != 1:
        return f"the pointwise convolution has {m.groups} groups"
    if any(s != 1 for s in m.stride) or any(p != 0 for p in m.padding):
        return "the pointwise convolution has a stride or padding"
    return ""


def merged_convolution(depthwise: nn.Module, pointwise: nn.Module) -> nn.Conv2d:
    """The regular convolution that equals pointwise(depthwise(x)) with nothing between."""
    p = weight_of(pointwise)[:, :, 0, 0]  # (O, C)
    d = weight_of(depthwise)[:, 0]  # (C, k, k)
    bias = p @ bias_or_zero(depthwise) + bias_or_zero(pointwise)
    return convolution_like(depthwise, torch.einsum("oi,ihw->oihw", p, d), bias)
