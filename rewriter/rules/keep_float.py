"""Leave one layer in float.

Before: x -> Q -> int8 layer -> y          After: x -> float layer -> y

The layer's weight is not quantized and it reads x before it is rounded; y is rounded only where an
int8 operation reads it. Nothing in the graph changes: the runtime computes this layer, and the
hand-over to it, in float.
Why: the yardstick for every other rule, and the answer where int8 cannot represent a layer at all.
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

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in layers(gm):
            yield self.site(node)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        mark_layer(gm, site, "keep_float")
