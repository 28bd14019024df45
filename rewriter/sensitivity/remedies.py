"""Which steps answer a harmful layer, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from rewriter.errors import RewriteError
from rewriter.graph import facts
from rewriter.graph.cost import layer_macs
from rewriter.int8.simulate import Quantized
from rewriter.plan import Plan, Step, rewrite, rule_named
from rewriter.rules import RULES, Site
from rewriter.rules._model_rule import MODEL
from rewriter.sensitivity.causes import Cause

# A layer's answers: each step and the MACs it adds.
Answers = tuple[tuple[str, int], ...]
# The rules that take a cause away, by how their names begin; of answers that cost the same these come first.
NAMED: dict[str, tuple[str, ...]] = {
    "weight_channel_spread": ("equalize", "split_weights", "add_residual_weights", "unmerge_rep"),
    "weight_outliers": ("unmerge_rep", "add_residual_weights", "phase_transpose", "round_weights"),
    "dead_channels": ("drop_dead_channels",),
    "bias_overflow": ("absorb_bias", "equalize"),
    "activation_channel_spread": (
        *("equalize", "scale_norm", "split_range", "replace_activation"),
        *("split_precision", "keep_int16"),
    ),
    "activation_outliers": (
        *(
            "refine_ranges",
            "split_channels",
            "replace_activation",
            "split_precision",
            "keep_int16",
        ),
    ),
    "shared_range": (
        *("split_head", "float_tail", "split_cat", "split_range", "float_trunk", "float_gate"),
        "fold_gate",
    ),
    "saturating_input": ("refine_ranges",),
    "idle_range": ("refine_ranges", "replace_activation"),
}


def find_answers(
    quantized: Quantized,
    harmful: Sequence[fx.Node],
    causes: Mapping[str, Sequence[Cause]] | None = None,
) -> dict[str, Answers]:
    """The steps that touch each layer or its input, free ones first, keeping the layer in float last.

    Of those that cost the same, the ones that take away a cause of the layer come first.

    Args:
        quantized: the network; where it was not profiled, calibrated ranges stand in.
        harmful: the layers to answer.
        causes: why each is harmful, by node name.
    """
    gm = quantized.gm
    lent = _lend_ranges(quantized)
    try:
        names = {n.name for n in harmful}
        sites = [
            s
            for rule in RULES
            if not rule.saves  # no answer to what int8 does
            for s in rule.near(gm, names | {MODEL})
            if not s.blocked
        ]
        added = _added_macs(gm, sites)
    finally:
        for node in lent:
            facts.CHANNEL_RANGE.drop(node)

    named = {
        name: tuple(rule for cause in found for rule in NAMED[cause.name])
        for name, found in (causes or {}).items()
    }

    def rank(site: Site, name: str) -> tuple[bool, int, bool]:
        meant = site.rule.startswith(named.get(name) or "-")
        return site.rule == "keep_float", added[Step.at(site)], not meant

    answers: dict[str, Answers] = {}
    for node in harmful:
        near = [s for s in sites if s.anchor == MODEL or node.name in (*s.nodes, *s.readers)]
        near.sort(key=lambda site: rank(site, node.name))  # sorted at once
        answers[node.name] = tuple((str(Step.at(s)), added[Step.at(s)]) for s in near)
    return answers


def _lend_ranges(quantized: Quantized) -> list[fx.Node]:
    """Give nodes the channel ranges that calibration saw, where nothing was profiled."""
    nodes = list(quantized.gm.graph.nodes)
    if any(facts.CHANNEL_RANGE.known(n) for n in nodes):
        return []
    lent: list[fx.Node] = []
    for node in nodes:
        seen = quantized.calibration.stats.get(node.name)
        if seen is not None:
            facts.CHANNEL_RANGE.put(node, (seen.channel_low, seen.channel_high))
            lent.append(node)
    return lent


def _added_macs(gm: fx.GraphModule, sites: Sequence[Site]) -> dict[Step, int]:
    """What each step adds, from as few rewrites as there are steps that exclude each other."""
    macs = layer_macs(gm)
    found = {Step.at(s): 0 for s in sites}
    left = [s for s in sites if not rule_named(s.rule).free]
    while left:
        together: list[Site] = []
        taken: set[str] = set()
        for site in left:
            if not taken.intersection(site.nodes):
                together.append(site)
                taken.update(site.nodes)
        found |= _added_together(gm, together, macs)
        left = [s for s in left if s not in together]
    return found


def _added_together(
    gm: fx.GraphModule, sites: Sequence[Site], macs: Mapping[str, int]
) -> dict[Step, int]:
    """What each of some steps adds that touch different nodes."""
    steps = [Step.at(s) for s in sites]
    try:
        after = rewrite(gm, Plan(tuple(steps)))
    except RewriteError:
        if len(sites) == 1:
            return {steps[0]: 0}
        return {k: v for s in sites for k, v in _added_together(gm, [s], macs).items()}
    total = layer_macs(after)
    made = dict.fromkeys(map(str, steps), 0)
    for node in after.graph.nodes:
        step = str(facts.REWRITTEN_BY.get(node, ""))
        if node.name in total and step in made:
            made[step] += total[node.name]
    found = {
        step: made[str(step)] - sum(macs.get(n, 0) for n in site.nodes)
        for step, site in zip(steps, sites, strict=True)
    }
    whole = sum(total.values()) - sum(macs.values())
    if sum(found.values()) == whole:
        return found
    if len(sites) == 1:
        return {steps[0]: whole}
    # a rule that leaves a layer of its site in place, or does not mark what it made: one by one
    return {k: v for s in sites for k, v in _added_together(gm, [s], macs).items()}
