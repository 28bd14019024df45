"""A whole inverted residual block -> one regular convolution.

Before: 1 x 1 (C -> E) -> [activation] -> depthwise k x k (E) -> [activation] -> 1 x 1 (E -> O)
After:  one k x k convolution (C -> O)

    W[o, c] = sum_e Q[o, e] D[e] P[e, c]   (O, C, k, k)      b = Q (d + p sum(D)) + q   (O,)

This product ignores the activations; it is the start of the fit (``rewriter.fitting.fit``).

Why: both int8 tensors inside the block, in many networks the worst of all, are gone.
Exact: no; fitted to the float network on calibration inputs.
Cost: k * k * C * O MACs for each output pixel, instead of C * E + k * k * E + E * O. The first
    block of a small network is thin (E is 8 or 16), so this is little more and often less.
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


class ReplaceBlock(RewriteRule):
    """One site for each 1 x 1, depthwise, 1 x 1."""

    name: ClassVar[str] = "replace_block"
    contract: ClassVar[Contract] = "approximate"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in gm.graph.nodes:
            if not is_pointwise(gm, node):
                continue
            first, depthwise, _ = follow(gm, node)
            if depthwise is None or not is_depthwise(gm, depthwise):
                continue
            second, project, blocked = follow(gm, depthwise)
            nodes = [*first, *second]
            blocked = depthwise_problem(module_of(gm, depthwise)) or blocked
            if project is not None:
                nodes.append(project)
                if not is_pointwise(gm, project):
                    blocked = blocked or f"{project.name} is no 1 x 1 convolution"
            yield self.site(*nodes, blocked=blocked)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        nodes = [find(gm, name) for name in site.nodes]
        project = nodes[-1]
        depthwise = next(n for n in nodes if is_depthwise(gm, n))
        layers = [module_of(gm, n) for n in (nodes[0], depthwise, project)]
        gm.set_submodule(str(project.target), _replaced(*layers))
        project.args = nodes[0].args
        for node in reversed(nodes[:-1]):
            gm.graph.erase_node(node)
        mark(project, site)


def _replaced(expand: nn.Module, depthwise: nn.Module, project: nn.Module) -> nn.Conv2d:
    p, d = weight_of(expand)[:, :, 0, 0], weight_of(depthwise)[:, 0]  # (E, C), (E, k, k)
    q = weight_of(project)[:, :, 0, 0]  # (O, E)
    inner = bias_or_zero(depthwise) + bias_or_zero(expand) * d.sum((1, 2))
    bias = q @ inner + bias_or_zero(project)
    return convolution_like(depthwise, torch.einsum("oe,ehw,ec->ochw", q, d, p), bias)
