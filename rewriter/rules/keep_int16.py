"""Store the output of one layer in 16 bits.

Before: x -> layer -> Q8 -> reader
After:  x -> layer -> Q16 -> reader

    step = range / 65535 instead of range / 255

The layers that read the value multiply 16-bit inputs by 8-bit weights. A clip is computed inside
the layer. An activation that the target does not fuse writes 16 bits too, or its own rounding
would undo the gain (not a sigmoid or tanh, whose [-1, 1] need no more than 256 levels). Weights
stay int8, and the bias is an int32 in steps 257 times as fine; where it would overflow,
calibration takes coarser weight scales, as always, and ``rewriter.int8.onnx.lint`` says so.
Nothing in the graph changes. Only targets with 16-bit activations have sites (``qnn``).

Why: one range then holds channels whose ranges differ by a factor of 256, on integer kernels.
Exact: the float network does not change, only its int8 form.
Cost: no MACs; the value takes twice the memory, and the layers that read it are slower.
Source: 16-bit activations with 8-bit weights chosen per tensor, as in ONNX Runtime's QNN provider
    (``rewriter.int8.scheme``, target ``qnn``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import fx

from rewriter.graph import facts
from rewriter.graph.lookup import layers
from rewriter.int8.annotate import Annotation, is_layer, notes_of
from rewriter.int8.scheme import QuantScheme
from rewriter.rules._rule import Contract, RewriteRule, Site, mark_layer


class KeepInt16(RewriteRule):
    """Store in 16 bits what a layer makes; one site for each, on targets that have it."""

    name: ClassVar[str] = "keep_int16"
    contract: ClassVar[Contract] = "annotation"
    free: ClassVar[bool] = True

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        scheme = facts.SCHEME.get(gm)
        if scheme is None or scheme.wide is None:
            return
        notes = notes_of(gm, scheme)
        for node in layers(gm):
            yield self._site(gm, node, notes, scheme)

    def site_at(self, gm: fx.GraphModule, anchor: str) -> Site | None:
        """Also where the target has no 16-bit activations: a plan that asks for them is told so."""
        scheme = facts.SCHEME.get(gm)
        if scheme is not None and scheme.wide is not None:
            return super().site_at(gm, anchor)
        node = next((n for n in layers(gm) if n.name == anchor), None)
        if node is None:
            return None
        which = "no target is given" if scheme is None else f"target {scheme.name}"
        return self.site(node, blocked=f"{which}: no 16-bit activations")

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        mark_layer(gm, site, "keep_int16")

    def _site(
        self,
        gm: fx.GraphModule,
        node: fx.Node,
        notes: dict[fx.Node, Annotation],
        scheme: QuantScheme,
    ) -> Site:
        value = node
        users = list(node.users)
        if notes[node].output is None and len(users) == 1 and not notes[users[0]].reads:
            value = users[0]  # an activation that the layer's kernel computes
        if facts.KEEP_FLOAT.get(node):
            return self.site(node, blocked="the layer is in float")
        if notes[value].output is None:
            return self.site(node, blocked="its value is not stored in int8: it is read in float")
        return self.site(node, readers=_readers(gm, value, notes))


def _readers(
    gm: fx.GraphModule, value: fx.Node, notes: dict[fx.Node, Annotation]
) -> Iterator[fx.Node]:
    """The layers that read a value in int8, directly or behind what is computed of it alone."""
    for user in value.users:
        if value.name not in notes[user].reads:
            continue
        if is_layer(gm, user):
            yield user
        elif len(user.all_input_nodes) == 1 and notes[user].output is not None:
            yield from _readers(gm, user, notes)
