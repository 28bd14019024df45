"""Depthwise convolution -> grouped convolution.

Before: C groups of 1 channel
After:  C / g groups of g channels, the old filters on the diagonal

    W[c, c mod g] = D[c], all else 0   (C, g, k, k)

This is the same function; it is then fitted (``rewriter.fitting.fit``).

Why: a depthwise filter cannot make up for its rounding error; a fitted filter over g channels can,
    with the help of its neighbors. Before the fit nothing is gained: ranges and errors are alike.
Exact: no; as it starts, yes, but the fit trades the float function for the int8 one.
Cost: g times the MACs and weights of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from rewriter.graph.lookup import find, module_of
from rewriter.rules._rule import Contract, RewriteRule, Site, mark
from rewriter.surgery.layer_chains import (
    bias_or_zero,
    convolution_like,
    depthwise_problem,
    is_depthwise,
    weight_of,
)


@dataclass(frozen=True)
class DensifyDepthwise(RewriteRule):
    """Groups of ``size`` channels; one site for each depthwise convolution."""

    size: int = 4
    contract: ClassVar[Contract] = "approximate"

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"densify_depthwise_{self.size}"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in gm.graph.nodes:
            if is_depthwise(gm, node):
                m = module_of(gm, node)
                blocked = depthwise_problem(m)
                if not blocked and m.in_channels % self.size:
                    blocked = f"{m.in_channels} channels are no multiple of {self.size}"
                yield self.site(node, blocked=blocked)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        node = find(gm, site.anchor)
        gm.set_submodule(str(node.target), _densified(module_of(gm, node), self.size))
        mark(node, site)


def _densified(depthwise: nn.Module, size: int) -> nn.Conv2d:
    d = weight_of(depthwise)  # (C, 1, k, k)
    channels = torch.arange(len(d))
    weight = torch.zeros(len(d), size, *d.shape[2:], dtype=d.dtype)
    weight[channels, channels % size] = d[:, 0]
    return convolution_like(depthwise, weight, bias_or_zero(depthwise), len(d) // size)
