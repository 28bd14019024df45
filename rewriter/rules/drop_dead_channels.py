"""Hidden channels that never change -> none of them, their constant in the next layer's bias.

Before: y = W2 act(W1 x + b1) + b2        row c of W1 is 0
After:  the same without row c, and b2 + W2[:, c] act(b1[c])

A channel whose filter is 0 (pruned, or whose batch norm has let it die) holds one number, and so has each value behind it
up to the next dense layer. Where zero padding lies in between, the border would differ: there only channels that hold 0 go.
Channels that the next layer multiplies with 0 go too.

Why: a dead channel's weights and biases set ranges though nothing depends on them, equalization scales them to extremes,
and each costs compute.
Exact: yes.
Cost: fewer MACs: the layers around a channel shrink by it.
Source: structured pruning, Li et al., 2017 (arXiv:1608.08710), of filters that are zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from rewriter.graph.lookup import find
from rewriter.rules._rule import Contract, RewriteRule, Site, mark
from rewriter.surgery.constant_channels import dead_channels, fold_constants
from rewriter.surgery.hidden_channels import (
    Hidden,
    hidden_channels,
    hidden_of,
    is_dense,
    keep_channels,
)


class DropDeadChannels(RewriteRule):
    """One site for each dense layer with hidden channels that are dead."""

    name: ClassVar[str] = "drop_dead_channels"
    contract: ClassVar[Contract] = "exact"
    exclusive: ClassVar[bool] = False
    free: ClassVar[bool] = True
    stage: ClassVar[Literal["replace", "split", "thin", "resize"]] = "replace"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for hidden in hidden_channels(gm):
            yield from self._sites(gm, hidden)

    def site_at(self, gm: fx.GraphModule, anchor: str) -> Site | None:
        node = next((n for n in gm.graph.nodes if n.name == anchor), None)
        if node is None or not is_dense(gm, node):
            return None
        return next(self._sites(gm, hidden_of(gm, node)), None)

    def _sites(self, gm: fx.GraphModule, hidden: Hidden) -> Iterator[Site]:
        if hidden.blocked or hidden.reader is None or not len(_gone(gm, hidden)):
            return  # nearly every layer has no dead channel: no near miss
        yield self.site(hidden.entry, *hidden.inside, readers=[hidden.reader])

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        hidden = hidden_of(gm, find(gm, site.anchor))
        dead = _gone(gm, hidden)
        fold_constants(gm, hidden, dead)
        left = torch.ones(hidden.channels, dtype=torch.bool)
        left[dead] = False
        keep_channels(gm, hidden, left.nonzero().flatten())
        for node in (hidden.entry, *hidden.inside, hidden.reader):
            if node is not None:
                mark(node, site)


def _gone(gm: fx.GraphModule, hidden: Hidden) -> Tensor:
    """The channels that go; one unit stays, since no layer may be empty."""
    dead = dead_channels(gm, hidden)
    return dead if len(dead) < hidden.channels else dead[hidden.unit :]
