"""Outlier channels -> two channels of half the size each.

Before: channel c in [-a, a]
After:  c and its copy, both in [-a / 2, a / 2]

    w x = w (x / 2) + w (x / 2)

The halves must pass what stands between: only f(x / 2) = f(x) / 2 (ReLU, LeakyReLU, PReLU), and
every reader must be a convolution or a linear layer.

Why: where one or a few channels stretch the range of a value, halving them gives all others twice
    the levels, in one tensor and without another kernel call.
Exact: yes.
Cost: MACs and weights grow by the share of channels that are copied.
Source: outlier channel splitting, Zhao et al., 2019 (arXiv:1901.09504).
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.channel_ranges import width
from rewriter.graph.lookup import find, is_call, module_of
from rewriter.graph.ops import types
from rewriter.rules._component import ComponentRule
from rewriter.rules._rule import Contract, Site
from rewriter.surgery.channel_component import Component, component_of, int8_values, is_dense
from rewriter.surgery.split_component import split_component

_HOMOGENEOUS = (nn.Conv2d, *types(lambda row: row.homogeneous))
# More copies than this share of the channels cost more than they bring.
LARGEST_SHARE = 1 / 8


class SplitChannels(ComponentRule):
    """One site for each component, at its first dense layer."""

    name: ClassVar[str] = "split_channels"
    contract: ClassVar[Contract] = "exact"

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        component = component_of(gm, find(gm, site.anchor))
        outliers = _outliers(gm, component)
        channels = [*range(component.channels), *outliers]
        split_component(gm, component, [channels], f"{site.rule}@{site.anchor}")
        half = torch.ones(len(channels))
        half[outliers] = half[component.channels :] = 0.5
        for node in component.entries:
            _scale_outputs(module_of(gm, node), half, bias_only=False)
        for node in component.inside:
            if is_call(gm, node, nn.Conv2d):  # its input is halved already
                _scale_outputs(module_of(gm, node), half, bias_only=True)
        for node in (*component.entries, *component.inside):
            if facts.CHANNEL_RANGE.known(node):
                low, high = facts.CHANNEL_RANGE.of(node)
                facts.CHANNEL_RANGE.put(node, (low * half.to(low), high * half.to(high)))

    def _problem(self, gm: fx.GraphModule, component: Component) -> str:
        if component.blocked:
            return component.blocked
        for node in component.inside:
            sums = node.target in (operator.add, operator.sub) and all(
                n in component.entries or n in component.inside for n in node.all_input_nodes
            )
            moves = node.target in (torch.mean, torch.flatten)
            if not (
                (sums and len(node.all_input_nodes) == 2)
                or moves
                or is_call(gm, node, *_HOMOGENEOUS)
            ):
                return f"half of {node.name}'s input does not give half of its output"
        for user, _ in component.exits:
            if not is_dense(gm, user):
                return f"{user.name}, which reads the channels, is no dense layer"
        widths = _widths(gm, component)
        if widths is None:
            return "no calibrated channel ranges"
        count, most = len(_outliers(gm, component)), int(component.channels * LARGEST_SHARE)
        if count == 0:
            return "all channels are zero"
        if count > most:
            return f"{count} of {component.channels} channels are wider than half the range"
        return ""


def _widths(gm: fx.GraphModule, component: Component) -> Tensor | None:
    """(V, C) widths of the channels of each int8 value."""
    known = [
        facts.CHANNEL_RANGE.of(n)
        for n in int8_values(gm, component)
        if facts.CHANNEL_RANGE.known(n)
    ]
    known = [r for r in known if len(r[0]) == component.channels]
    return torch.stack([width(low, high) for low, high in known]) if known else None


def _outliers(gm: fx.GraphModule, component: Component) -> list[int]:
    """Channels wider than half of the widest, in any value."""
    widths = _widths(gm, component)
    assert widths is not None
    wide = widths > widths.amax(1, keepdim=True) / 2
    return wide.any(0).nonzero().flatten().tolist()


def _scale_outputs(layer: nn.Module, scale: Tensor, bias_only: bool) -> None:
    weight = layer.weight.detach()  # type: ignore[union-attr]
    assert isinstance(weight, Tensor)
    factor = scale.to(weight)
    if not bias_only:
        axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        shape = [-1 if d == axis else 1 for d in range(weight.ndim)]
        layer.weight = nn.Parameter(weight * factor.view(shape), requires_grad=False)
    if isinstance(layer.bias, Tensor):
        layer.bias = nn.Parameter(layer.bias.detach() * factor, requires_grad=False)
