"""Compute the gate of a squeeze-and-excitation block in float.

Before: x -> mean -> int8 layer -> ReLU -> int8 layer -> sigmoid -> Q; y = x g
After:  x -> mean -> float layer -> ReLU -> float layer -> sigmoid -> Q; y = x g

Nothing in the graph changes: x, the gate in [0, 1] and their product stay in int8, what lies between
the mean and the gate runs in float.

Why: an error in a gate multiplies a whole channel at every place, while its two layers see one
    value for each channel and hold a fraction of a percent of the MACs. The mean and what the layers make
    have ranges of their own, each rounded once more.
Exact: the float network does not change, only its int8 form.
Cost: no MACs; the two layers of the gate run on float kernels, with a conversion on either side.
Source: OpenVINO's NNCF leaves these blocks out of quantization by its ignored patterns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import fx

from rewriter.graph import facts
from rewriter.graph.lookup import find
from rewriter.rules._rule import Contract, RewriteRule, Site, mark
from rewriter.surgery.gates import gates


class FloatGate(RewriteRule):
    """One site for each gate, at its first layer."""

    name: ClassVar[str] = "float_gate"
    contract: ClassVar[Contract] = "annotation"
    free: ClassVar[bool] = True
    float_layers: ClassVar[int] = 2

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for gated in gates(gm):
            layers = gated.layers(gm)
            rest = [n for n in gated.chain if n not in layers]
            kept = all(facts.KEEP_FLOAT.get(n) for n in layers)
            blocked = "the gate is in float already" if kept else ""
            yield self.site(*layers, *rest, blocked=blocked)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        for name in site.nodes:
            node = find(gm, name)
            facts.KEEP_FLOAT.put(node, True)
            mark(node, site)
