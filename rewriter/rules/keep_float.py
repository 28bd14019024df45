"""Leave one layer in float.

Before: x -> Q -> int8 layer -> y
After:  x -> float layer -> y

The layer's weight is not quantized and it reads x before it is rounded; y is rounded only where an
int8 operation reads it. Nothing in the graph changes: the runtime computes this layer in float,
and converts on the way in and out.

Why: it is what every other rule is compared with, and the last resort where int8 cannot represent
    a layer at all.
Exact: the float network does not change, only its int8 form.
Cost: no MACs, but the layer runs on float kernels. `search: {max_float_layers: ...}` limits them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import fx

from rewriter.graph.lookup import layers
from rewriter.rules._rule import Contract, RewriteRule, Site, mark_layer


class KeepFloat(RewriteRule):
    """One site for each layer with weights."""

    name: ClassVar[str] = "keep_float"
    contract: ClassVar[Contract] = "annotation"
    free: ClassVar[bool] = True
    float_layers: ClassVar[int] = 1

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in layers(gm):
            yield self.site(node)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        mark_layer(gm, site, "keep_float")
