"""Hidden channels of a dense layer -> fewer of them.

Before: dense (C) -> [activation, depthwise, gate] -> dense reader of C channels
After:  the same on K < C channels, the reader refitted

    W' = argmin |t - h' W'|^2        h' (rows, K): what is left; t: what the float network has there

K is a multiple of 8 (of 16 for wide layers), which integer kernels like best, and of the width of
groups in between. Which channels go is found by the optimal brain surgeon on the second moments of
what the reader reads; without a fit those stay that contribute most, range times weight.

Why: hidden channels of an inverted residual, a bottleneck or an MLP are read by one layer only,
many are nearly a combination of others, and their layers hold most of the compute. What is saved
pays for rewrites that cost compute, and a channel that alone sets an int8 range goes early.
Exact: no; the reader is refitted in closed form, step after step (``rewriter.fitting.thinning``).
Cost: fewer MACs: the entry, what lies between, and the reader shrink by K / C.
Source: Hassibi and Stork, 1993 (optimal brain surgeon); Meng et al., 2024 (arXiv:2403.12983).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.cost import layer_macs
from rewriter.graph.lookup import find, module_of
from rewriter.rules._rule import Contract, RewriteRule, Site, mark
from rewriter.surgery.hidden_channels import (
    Hidden,
    hidden_channels,
    hidden_of,
    is_dense,
    keep_channels,
)

# Percent of the channels that stay.
AMOUNTS = (88, 75, 62, 50, 38, 25)
# Layers that are less wide count channels by 8, others by 16.
WIDE = 96


@dataclass(frozen=True)
class ThinChannels(RewriteRule):
    """About ``percent`` of the channels stay; one site for each dense layer with hidden channels."""

    percent: int = 75
    contract: ClassVar[Contract] = "approximate"
    stage: ClassVar[Literal["replace", "split", "thin", "resize"]] = "thin"
    in_graph_order: ClassVar[bool] = True
    saves: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"thin_channels_{self.percent}"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for hidden in hidden_channels(gm):
            yield from self._sites(hidden)

    def site_at(self, gm: fx.GraphModule, anchor: str) -> Site | None:
        node = next((n for n in gm.graph.nodes if n.name == anchor), None)
        if node is None or not is_dense(gm, node):
            return None
        return next(self._sites(hidden_of(gm, node)), None)

    def _sites(self, hidden: Hidden) -> Iterator[Site]:
        first = self.percent == AMOUNTS[0]  # a near miss is shown once
        readers = [] if hidden.reader is None else [hidden.reader]
        if hidden.blocked:
            if first:
                yield self.site(hidden.entry, blocked=hidden.blocked, readers=readers)
            return
        counts = kept_counts(hidden.channels, hidden.unit)
        nodes = (hidden.entry, *hidden.inside)
        if self.percent in counts:
            yield self.site(*nodes, readers=readers)
        elif first and not counts:
            few = f"no smaller multiple of {_multiple(hidden.channels, hidden.unit)} is near"
            yield self.site(*nodes, blocked=f"{hidden.channels} channels: {few}", readers=readers)

    def added_macs(self, gm: fx.GraphModule, site: Site) -> int | None:
        hidden = hidden_of(gm, find(gm, site.anchor))
        count = kept_counts(hidden.channels, hidden.unit)[self.percent]
        macs = layer_macs(gm)
        own = (hidden.entry, *hidden.inside, *(g.squeeze for g in hidden.gates))
        spent = sum(macs.get(n.name, 0) for n in own)
        assert hidden.reader is not None
        width = module_of(gm, hidden.reader).weight.shape[1]
        spent += macs[hidden.reader.name] * hidden.channels / width
        return -round(spent * (1 - count / hidden.channels))

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        hidden = hidden_of(gm, find(gm, site.anchor))
        count = kept_counts(hidden.channels, hidden.unit)[self.percent]
        worth = _contribution(gm, hidden).view(-1, hidden.unit).sum(1)
        units = worth.argsort(descending=True)[: count // hidden.unit].sort().values
        self._keep(gm, site, hidden, channels_of_units(units, hidden.unit))

    def apply_fitted(self, gm: fx.GraphModule, site: Site, state: Mapping[str, Tensor]) -> bool:
        hidden = hidden_of(gm, find(gm, site.anchor))
        self._keep(gm, site, hidden, state["kept"])
        for path, value in state.items():
            owner, _, name = path.rpartition(".")
            if owner:
                module = module_of(gm, find(gm, owner))
                setattr(module, name, nn.Parameter(value.clone(), requires_grad=False))
        return True

    def _keep(self, gm: fx.GraphModule, site: Site, hidden: Hidden, kept: Tensor) -> None:
        keep_channels(gm, hidden, kept)
        assert hidden.reader is not None
        mark(hidden.reader, site)


def channels_of_units(units: Tensor, unit: int) -> Tensor:
    """Numbers of all channels of some units."""
    return (units[:, None] * unit + torch.arange(unit)).flatten()


def kept_counts(channels: int, unit: int) -> dict[int, int]:
    """How many channels stay, by percent; of amounts that come to as many the nearest is left.

    >>> kept_counts(144, 1)
    {88: 128, 75: 112, 62: 96, 50: 80, 38: 48, 25: 32}
    >>> kept_counts(32, 1)
    {75: 24, 50: 16, 25: 8}
    >>> kept_counts(10, 1)
    {75: 8}
    """
    multiple = _multiple(channels, unit)
    nearest: dict[int, int] = {}
    for percent in AMOUNTS:
        wanted = percent * channels / 100
        # halves up: the larger network
        count = multiple * math.floor(wanted / multiple + 0.5)
        if 0 < count < channels:
            rival = nearest.get(count)
            if rival is None or abs(wanted - count) < abs(rival * channels / 100 - count):
                nearest[count] = percent
    return {percent: count for count, percent in nearest.items()}


def _multiple(channels: int, unit: int) -> int:
    return math.lcm(unit, 16 if channels >= WIDE else 8)


def _contribution(gm: fx.GraphModule, hidden: Hidden) -> Tensor:
    """(C,) what each channel adds to the reader's outputs, roughly."""
    assert hidden.reader is not None
    weight = module_of(gm, hidden.reader).weight.detach().double()
    own = weight[:, hidden.offset : hidden.offset + hidden.channels]
    worth = own.square().sum([d for d in range(own.ndim) if d != 1]).sqrt()
    known = facts.CHANNEL_RANGE.get(hidden.values()[-1])
    if known is not None and len(known[0]) == hidden.channels:
        worth = worth * (known[1] - known[0]).double().clamp_min(1e-12)
    return worth
