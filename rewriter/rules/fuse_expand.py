"""Expansion and depthwise convolution -> one regular convolution, as in the FusedMBConv block.

Before: 1 x 1 convolution (C -> E) -> [activation] -> depthwise k x k (E channels)
After:  one k x k convolution (C -> E)

    W[e, c] = D[e] P[e, c]   (E, C, k, k)      b[e] = d[e] + p[e] sum(D[e])   (E,)

This product ignores the activation; it is the start of the fit (``rewriter.fitting.fit``).

Why: the depthwise convolution with the worst int8 error is often the one behind the first
    expansion, and it reads an activation whose channels differ widely. Both are gone.
Exact: no; fitted to the float network on calibration inputs.
Cost: k * k * C * E MACs for each output pixel, instead of C * E + k * k * E.
Source: Gupta and Tan, 2019, EfficientNet-EdgeTPU; Tan and Le, 2021 (arXiv:2104.00298).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import fx, nn

from rewriter.graph.lookup import find, module_of
from rewriter.rules._rule import Contract, RewriteRule, Site, mark
from rewriter.surgery.layer_chains import (
    bias_or_zero,
    convolution_like,
    depthwise_problem,
    follow,
    is_depthwise,
    is_pointwise,
    weight_of,
)


class FuseExpand(RewriteRule):
    """One site for each 1 x 1 convolution before a depthwise one."""

    name: ClassVar[str] = "fuse_expand"
    contract: ClassVar[Contract] = "approximate"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in gm.graph.nodes:
            if not is_pointwise(gm, node):
                continue
            passed, depthwise, blocked = follow(gm, node)
            if depthwise is None:
                # a near miss only where a depthwise convolution does read it
                if any(is_depthwise(gm, user) for user in passed[-1].users):
                    yield self.site(*passed, blocked=blocked)
            elif is_depthwise(gm, depthwise):
                problem = depthwise_problem(module_of(gm, depthwise))
                yield self.site(*passed, depthwise, blocked=problem)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        nodes = [find(gm, name) for name in site.nodes]
        depthwise = nodes[-1]
        fused = _fused(module_of(gm, nodes[0]), module_of(gm, depthwise))
        gm.set_submodule(str(depthwise.target), fused)
        depthwise.args = nodes[0].args
        for node in reversed(nodes[:-1]):
            gm.graph.erase_node(node)
        mark(depthwise, site)


def _fused(expand: nn.Module, depthwise: nn.Module) -> nn.Conv2d:
    p, d = weight_of(expand)[:, :, 0, 0], weight_of(depthwise)[:, 0]  # (E, C), (E, k, k)
    bias = bias_or_zero(depthwise) + bias_or_zero(expand) * d.sum((1, 2))
    return convolution_like(depthwise, torch.einsum("ehw,ec->echw", d, p), bias)
