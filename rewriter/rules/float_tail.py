"""Leave everything behind the last layers in float.

Before: heads -> int8 reshape, sigmoid, decoding, concatenation of boxes and scores -> output
After:  heads -> the same in float -> output

Each head keeps the int8 range of its own output. The fixed convolution that takes the expectation
of a distribution over bins counts as such arithmetic too. Nothing in the graph changes.

Why: as int8, a concatenation of boxes in pixels and scores in [0, 1] has one range, and the scores
    are lost. The arithmetic behind the last layers has no weights.
Exact: the float network does not change, only its int8 form.
Cost: no MACs; the operators behind the heads run in float.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import fx

from rewriter.graph import facts
from rewriter.int8.annotate import is_decoding, is_layer
from rewriter.rules._rule import Contract, RewriteRule, Site, mark


class FloatTail(RewriteRule):
    """One site, anchored at the output, where anything stands behind the last layers."""

    name: ClassVar[str] = "float_tail"
    contract: ClassVar[Contract] = "annotation"
    exclusive: ClassVar[bool] = False
    free: ClassVar[bool] = True

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        (output,) = gm.graph.find_nodes(op="output")
        if tail := _tail(gm):
            yield self.site(output, *tail)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        for node in _tail(gm):
            facts.KEEP_FLOAT.put(node, True)
            mark(node, site)


def _tail(gm: fx.GraphModule) -> list[fx.Node]:
    """What depends on a layer and on which no layer depends."""
    before: set[fx.Node] = set()  # nodes on which a layer depends, and the layers
    after: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if _is_head(gm, node) or any(user in before for user in node.users):
            before.add(node)
    found: list[fx.Node] = []
    for node in gm.graph.nodes:
        if _is_head(gm, node) or any(n in after for n in node.all_input_nodes):
            after.add(node)
            if node not in before and node.op != "output":
                found.append(node)
    return found


def _is_head(gm: fx.GraphModule, node: fx.Node) -> bool:
    return is_layer(gm, node) and not is_decoding(gm, node)
