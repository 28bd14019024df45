"""Which steps answer a harmful layer, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from rewriter.cost import layer_macs
from rewriter.int8.simulate import Quantized
from rewriter.plan import Plan, Step, find_sites, rewrite, rule_named


def find_answers(
    quantized: Quantized, harmful: Sequence[fx.Node]
) -> dict[str, tuple[tuple[str, int], ...]]:
    """The steps that touch each layer, with the MACs each adds; free ones first, keeping it in float last.

    Args:
        quantized: the network; where it was not profiled, calibrated ranges stand in.
        harmful: the layers to answer.
    """
    gm = quantized.gm
    borrowed = _lend_ranges(quantized)
    try:
        sites = [s for s in find_sites(gm) if not s.blocked]
        before = sum(layer_macs(gm).values())
        costs: dict[tuple[str, str], int] = {}
        found: dict[str, tuple[tuple[str, int], ...]] = {}
        for node in harmful:
            touching = [s for s in sites if node.name in s.nodes or s.anchor == "model"]
            for s in touching:
                key = (s.rule, s.anchor)
                if key not in costs:
                    costs[key] = _added_macs(gm, Step(*key), before)
            ranked = sorted(
                ((s.rule == "keep_float", costs[s.rule, s.anchor], s) for s in touching),
                key=lambda t: t[:2],
            )
            found[node.name] = tuple((f"{s.rule}@{s.anchor}", macs) for _, macs, s in ranked)
        return found
    finally:
        for node in borrowed:
            del node.meta["channel_range"]


def _lend_ranges(quantized: Quantized) -> list[fx.Node]:
    """Give nodes the channel ranges that calibration saw, where nothing was profiled."""
    nodes = list(quantized.gm.graph.nodes)
    if any("channel_range" in n.meta for n in nodes):
        return []
    lent: list[fx.Node] = []
    for node in nodes:
        seen = quantized.calibration.stats.get(node.name)
        if seen is not None:
            node.meta["channel_range"] = (seen.channel_low, seen.channel_high)
            lent.append(node)
    return lent


def _added_macs(gm: fx.GraphModule, step: Step, before: int) -> int:
    if rule_named(step.rule).free:
        return 0
    return sum(layer_macs(rewrite(gm, Plan((step,)))).values()) - before
