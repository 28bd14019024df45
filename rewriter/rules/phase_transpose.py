"""Transposed convolution that does not overlap -> 1 x 1 convolution and pixel shuffle.

Before: transposed convolution (C_in -> C_out, kernel = stride = s)
After:  1 x 1 convolution (C_in -> C_out s s) -> pixel shuffle

    W'[o s s + i s + j, c] = W[c, o, i, j]      b'[o s s + i s + j] = b[o]

Why: each of the s x s phases of the output has weights, and so a weight scale, of its own; targets without
    an int8 kernel for transposed convolutions run it as a convolution anyway.
Exact: yes.
Cost: none.
Source: Shi et al., 2016 (arXiv:1609.07009), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import add_module
from rewriter.graph.lookup import find, is_call, module_of
from rewriter.rules._rule import Contract, RewriteRule, Site, mark


class PhaseTranspose(RewriteRule):
    """One site for each transposed convolution."""

    name: ClassVar[str] = "phase_transpose"
    contract: ClassVar[Contract] = "exact"
    free: ClassVar[bool] = True

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in gm.graph.nodes:
            if is_call(gm, node, nn.ConvTranspose2d):
                yield self.site(node, blocked=_problem(node, module_of(gm, node)))

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        node = find(gm, site.anchor)
        layer: Any = module_of(gm, node)
        stride = layer.stride[0]
        made = nn.Conv2d(layer.in_channels, layer.out_channels * stride * stride, 1)
        weight = layer.weight.detach().permute(1, 2, 3, 0).reshape(-1, layer.in_channels, 1, 1)
        made.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
        made.bias = None
        if layer.bias is not None:
            repeated = layer.bias.detach().repeat_interleave(stride * stride)
            made.bias = nn.Parameter(repeated, requires_grad=False)
        gm.set_submodule(str(node.target), made.eval())
        path = add_module(gm, f"{node.target}_shuffle", nn.PixelShuffle(stride))
        with gm.graph.inserting_after(node):
            shuffled = gm.graph.call_module(path, (node,))
        facts.inherit(shuffled, node)
        node.replace_all_uses_with(shuffled, delete_user_cb=lambda user: user is not shuffled)
        n, channels, height, width = facts.SHAPE.of(node)
        size = (n, channels * stride * stride, height // stride, width // stride)
        facts.SHAPE.put(node, size)
        known = facts.CHANNEL_RANGE.get(shuffled)
        if known is not None:  # a phase reaches at most what the channel does
            low, high = (end.repeat_interleave(stride * stride) for end in known)
            facts.CHANNEL_RANGE.put(node, (low, high))
        mark(node, site)


def _problem(node: fx.Node, layer: Any) -> str:
    if len(node.args) > 1 or node.kwargs:
        return "its output size is given in the call"
    if layer.groups != 1:
        return f"it has {layer.groups} groups"
    if layer.stride[0] != layer.stride[1]:
        return f"its strides differ: {layer.stride[0]} and {layer.stride[1]}"
    if tuple(layer.kernel_size) != tuple(layer.stride):
        return f"kernel {tuple(layer.kernel_size)} and stride {tuple(layer.stride)} overlap"
    padded = any((*layer.padding, *layer.output_padding))
    if padded or any(d != 1 for d in layer.dilation):
        return "it is padded or dilated"
    return ""
