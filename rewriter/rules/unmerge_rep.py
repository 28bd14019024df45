"""Kernel with an identity in it -> the kernel without it, beside a scale for each channel.

Before: x -> convolution W (C -> C, k x k, stride 1) -> y
After:  x -> convolution W' -> + -> y
        x -> depthwise 1 x 1 d -^

    W = W' + d on the diagonal of the middle tap, W'[c, c] = W[c, c] cut to the largest other weight of row c

Why: a re-parameterized kernel holds the identity branch that it was trained with: one large weight
    in each output channel sets the scale of all others. As a layer of its own it has a scale of its
    own.
Exact: yes.
Cost: one MAC for each output value, and an addition.
Source: the reverse of the merge in Ding et al., 2021 (RepVGG, arXiv:2101.03697); that it is what breaks int8: Chu et
    al., 2022 (QARepVGG, arXiv:2212.01593).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import add_module
from rewriter.graph.lookup import find, is_call, module_of
from rewriter.rules._rule import Contract, RewriteRule, Site, mark

# The largest weight of half of the channels must fall to this share.
MOST_LEFT = 0.5


class UnmergeRep(RewriteRule):
    """One site for each convolution that may hold an identity; a near miss where its weights are not large."""

    name: ClassVar[str] = "unmerge_rep"
    contract: ClassVar[Contract] = "exact"
    stage: ClassVar[Literal["replace", "split", "thin", "resize"]] = "split"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        return (site for n in gm.graph.nodes if (site := self._site(gm, n)) is not None)

    def site_at(self, gm: fx.GraphModule, anchor: str) -> Site | None:
        node = next((n for n in gm.graph.nodes if n.name == anchor), None)
        return None if node is None else self._site(gm, node)

    def _site(self, gm: fx.GraphModule, node: fx.Node) -> Site | None:
        if is_call(gm, node, nn.Conv2d) and _may_hold_identity(module_of(gm, node)):
            return self.site(node, blocked=_problem(module_of(gm, node)))
        return None

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        node = find(gm, site.anchor)
        layer: Any = copy.deepcopy(module_of(gm, node))
        rest, diagonal = _divided(layer)
        layer.weight = nn.Parameter(rest, requires_grad=False)
        gm.set_submodule(str(node.target), layer)
        channels = len(diagonal)
        scale = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        scale.weight = nn.Parameter(diagonal.view(-1, 1, 1, 1).clone(), requires_grad=False)
        users = list(node.users)
        with gm.graph.inserting_after(node):
            path = add_module(gm, f"{node.target}_identity", scale.eval())
            passed = gm.graph.call_module(path, node.args)
        with gm.graph.inserting_after(passed):
            total = gm.graph.call_function(operator.add, (node, passed))
        for new in (passed, total):
            facts.inherit(new, node)
            mark(new, site)
        facts.CHANNEL_RANGE.drop(passed)
        facts.CHANNEL_RANGE.drop(node)
        if facts.CHANNEL_RANGE.known(node.args[0]):  # type: ignore[arg-type]
            low, high = facts.CHANNEL_RANGE.of(node.args[0])  # type: ignore[arg-type]
            d = diagonal.to(low)
            ends = torch.stack([low * d, high * d])
            facts.CHANNEL_RANGE.put(passed, (ends.amin(0), ends.amax(0)))
        mark(node, site)
        for user in users:
            user.replace_input_with(node, total)


def _may_hold_identity(layer: Any) -> bool:
    """Whether one tap of a convolution lies on the value that it replaces."""
    odd = all(k % 2 == 1 for k in layer.kernel_size)
    same = layer.padding == "same" or tuple(layer.padding) == tuple(
        d * (k // 2) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
    )
    square = layer.in_channels == layer.out_channels and layer.groups == 1
    return odd and same and square and all(s == 1 for s in layer.stride)


def _divided(layer: Any) -> tuple[Tensor, Tensor]:
    """W' (C, C, k, k) and d (C,)."""
    weight = layer.weight.detach().clone()
    channels = torch.arange(len(weight))
    middle = tuple(k // 2 for k in layer.kernel_size)
    own = weight[channels, channels, middle[0], middle[1]].clone()
    weight[channels, channels, middle[0], middle[1]] = 0
    largest = weight.abs().amax((1, 2, 3))
    cut = torch.minimum(torch.maximum(own, -largest), largest)
    weight[channels, channels, middle[0], middle[1]] = cut
    return weight, own - cut


def _problem(layer: Any) -> str:
    rest, _ = _divided(layer)
    before = layer.weight.detach().abs().amax((1, 2, 3)).clamp_min(1e-30)
    left = float((rest.abs().amax((1, 2, 3)) / before).median())
    if left > MOST_LEFT:
        return f"without an identity {left:.0%} of the largest weight is left"
    return ""
