"""Add to a residual trunk in float.

Before: x -> Q8; f(x) -> Q8; x + f(x) -> Q8; ...
After:  the layers read x in int8 as before; x + f(x), and the next sum on it, in float

Nothing in the graph changes. What a layer adds to the trunk is read as its kernel writes it: in
float where it can (linear layers on ONNX Runtime), rounded in its own range elsewhere.

Why: each sum of a trunk is rounded in a range that grows from block to block, so that what late
    blocks add is lost in the steps of what early ones have. The layers have all the weights; a sum has none,
    and before a layer norm the trunk is read in float anyway.
Exact: the float network does not change, only its int8 form.
Cost: no MACs; the additions run in float, with conversions where a convolution writes int8.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import ClassVar

from torch import fx

from rewriter.graph import facts
from rewriter.graph.lookup import find
from rewriter.int8.annotate import Annotation, is_layer, moves_values, notes_of
from rewriter.rules._rule import Contract, RewriteRule, Site, mark

# Sums of one trunk from which there is something that adds up.
LEAST_SUMS = 2


class FloatTrunk(RewriteRule):
    """One site for each residual trunk, at its first sum, with all its sums."""

    name: ClassVar[str] = "float_trunk"
    contract: ClassVar[Contract] = "annotation"
    free: ClassVar[bool] = True

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        scheme = facts.SCHEME.get(gm)
        if scheme is None:
            return
        notes = notes_of(gm, scheme)
        for sums in _trunks(gm):
            if len(sums) >= LEAST_SUMS:
                yield self._site(gm, sums, notes)

    def _site(
        self, gm: fx.GraphModule, sums: list[fx.Node], notes: dict[fx.Node, Annotation]
    ) -> Site:
        readers = [r for value in sums for r in _layers_behind(gm, value)]
        rounded = any(
            notes[value].output is not None and not facts.KEEP_FLOAT.get(value) for value in sums
        )
        blocked = "" if rounded else "its sums are in float already"
        return self.site(*sums, blocked=blocked, readers=readers)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        for name in site.nodes:
            node = find(gm, name)
            facts.KEEP_FLOAT.put(node, True)
            facts.READS_FLOAT.put(node, True)
            mark(node, site)


def _trunks(gm: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """Sums that read each other, directly or moved, in graph order."""
    trunk: dict[fx.Node, list[fx.Node]] = {}
    found: list[list[fx.Node]] = []
    for node in gm.graph.nodes:
        tensors = [n for n in node.args if isinstance(n, fx.Node) and n.op != "get_attr"]
        if node.target is not operator.add or len(set(tensors)) != 2:
            continue
        before = next((t for n in tensors if (t := trunk.get(_unmoved(gm, n))) is not None), None)
        if before is None:
            before = []
            found.append(before)
        before.append(node)
        trunk[node] = before
    yield from found


def _unmoved(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    while moves_values(gm, node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _layers_behind(gm: fx.GraphModule, value: fx.Node) -> Iterator[fx.Node]:
    """The layers that read a sum, directly or behind what is no layer and no sum."""
    queue, seen = [value], {value}
    while queue:
        for user in queue.pop().users:
            if user in seen or user.target is operator.add:
                continue
            seen.add(user)
            if is_layer(gm, user):
                yield user
            else:
                queue.append(user)
