"""Channels of very different ranges -> groups of channels, each a tensor with its own range.

Before: x -> conv (C outputs) -> activation, depthwise, ... -> conv -> y
After:  x -> k convs (C_1 + ... + C_k = C) -> the same on each group -> k convs that read one group
        each -> sum -> y

    conv(x) = sum_g W[:, g] x[g] + b

Where the ranges have become alike on the way (behind a depthwise convolution), the groups are
concatenated before the dense layer that reads them, whose input channels are reordered: cheaper
than a sum, and one rounding instead of k. Where a value is read by what mixes channels otherwise,
it is joined again in float. Groups are found by dynamic programming on the calibrated ranges
(``rewriter.surgery.group_channels``) of all int8 values that are split together, each channel's
error weighted by what its readers make of it: a depthwise convolution amplifies the narrow
channels that it was trained to see. ``split_weights_k`` groups by the size of the weights instead,
for targets with one weight scale per layer.

Why: one int8 tensor has one scale; where one channel reaches 125 and the others 0.2, the others
    are all zero. Scaling channels instead (equalization) stops at the first activation that is not
    homogeneous (SiLU, hardswish); a split passes all of them, and sums and products of two values
    when both are split alike.
Groups have multiples of 8 channels, or of 16 or 32 where there are many: kernels compute so many at once, and one for 5 channels
takes as long as one for 8. Fewer than 16 channels are grouped as they are.

Exact: yes.
Cost: no MACs; k kernel calls instead of one, and k - 1 additions at each dense reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import find, is_call, module_of
from rewriter.rules._component import ComponentRule
from rewriter.rules._rule import Contract, Site
from rewriter.surgery.channel_component import (
    Component,
    component_of,
    importance,
    int8_values,
    is_dense,
    joined_values,
)
from rewriter.surgery.group_channels import group_by_range, rounding_error
from rewriter.surgery.split_component import Groups, split_component

# (channels, so many of which kernels compute at once): of layers with at least as many channels.
MULTIPLES = ((512, 32), (128, 16), (16, 8), (0, 1))
# A split must take away at least this share of the rounding error; each group costs a kernel call.
LEAST_GAIN = 0.5


@dataclass(frozen=True)
class SplitRange(ComponentRule):
    """Split a component by the range of its values; one site, at its first dense layer."""

    groups: int = 2
    version: ClassVar[int] = 2
    contract: ClassVar[Contract] = "exact"
    free: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"split_range_{self.groups}"

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        component = component_of(gm, find(gm, site.anchor))
        groups = self._groups(gm, component)
        joined = self._joined(gm, component)
        split_component(gm, component, groups, f"{site.rule}@{site.anchor}", joined)

    def _readers(self, component: Component) -> Iterator[fx.Node]:
        return (user for user, _ in component.exits if user.op != "output")

    def _joined(self, gm: fx.GraphModule, component: Component) -> set[fx.Node]:
        return joined_values(gm, component, self.groups)

    def _problem(self, gm: fx.GraphModule, component: Component) -> str:
        if component.blocked:
            return component.blocked
        if component.channels < 2 * self.groups:
            return f"{component.channels} channels are too few for {self.groups} groups"
        unit = multiple_of(component.channels)
        if component.channels < unit * self.groups:
            most = component.channels // unit
            return (
                f"{component.channels} channels make at most {most} groups of multiples of {unit}"
            )
        if not any(is_dense(gm, user) for user, _ in component.exits) and not any(
            is_call(gm, n, nn.Conv2d) for n in component.inside
        ):
            return "no convolution or linear layer reads the channels"
        low, high, weight = self._ranges(gm, component)
        if low.numel() == 0:
            known = any(facts.CHANNEL_RANGE.known(n) for n in component.entries)
            return "no value's channels are uneven" if known else "no calibrated channel ranges"
        whole = rounding_error(low, high, [list(range(component.channels))], weight)
        groups = self._grouped(component, low, high, weight)
        left = rounding_error(low, high, groups, weight)
        # the split of a neighbour takes some of the gain away; what the place had to offer is settled
        least = 0.0 if _near_a_split(component) else LEAST_GAIN
        if left >= (1 - least) * whole:  # also where all are zero
            share = left / whole if whole else 1.0
            return f"{self.groups} groups leave {share:.0%} of the rounding error"
        return ""

    def _groups(self, gm: fx.GraphModule, component: Component) -> Groups:
        low, high, weight = self._ranges(gm, component)
        return self._grouped(component, low, high, weight)

    def _grouped(
        self, component: Component, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Groups:
        return group_by_range(low, high, self.groups, weight, multiple_of(component.channels))

    def _ranges(
        self, gm: fx.GraphModule, component: Component
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(V, C) ranges by which the channels are grouped, and the importance of each."""
        joined = self._joined(gm, component)  # these have one range again
        known = [
            n
            for n in int8_values(gm, component)
            if facts.CHANNEL_RANGE.known(n) and n not in joined
        ]
        known = [n for n in known if len(facts.CHANNEL_RANGE.of(n)[0]) == component.channels]
        if not known:
            return torch.empty(0, 0), torch.empty(0, 0), None
        ranges = [facts.CHANNEL_RANGE.of(n) for n in known]
        weight = importance(gm, component)
        low, high = (torch.stack([r[i] for r in ranges]) for i in (0, 1))
        return low, high, torch.stack([weight[n] for n in known])


@dataclass(frozen=True)
class SplitWeights(SplitRange):
    """Split a component by the size of the weights that make its values."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"split_weights_{self.groups}"

    def _joined(self, gm: fx.GraphModule, component: Component) -> set[fx.Node]:
        return set()  # each part of a reader has a weight scale of its own

    def _ranges(
        self, gm: fx.GraphModule, component: Component
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        sizes: list[Tensor] = []
        for node in (*component.entries, *component.inside):
            if is_call(gm, node, nn.Conv2d, nn.ConvTranspose2d, nn.Linear):
                layer = module_of(gm, node)
                axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
                rest = [d for d in range(layer.weight.ndim) if d != axis]
                sizes.append(layer.weight.detach().abs().amax(rest))
        size = torch.stack(sizes)
        return -size, size, None


def multiple_of(channels: int) -> int:
    """Of how many channels the groups of so many are multiples."""
    return next(unit for least, unit in MULTIPLES if channels >= least)


def _near_a_split(component: Component) -> bool:
    """Whether an earlier step has split layers that make or read the values."""
    readers = (user for user, _ in component.exits)
    steps = (str(facts.REWRITTEN_BY.get(n, "")) for n in (*component.entries, *readers))
    return any(step.startswith("split_") for step in steps)
