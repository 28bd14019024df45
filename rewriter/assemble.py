"""From a plan to the quantized network that would ship: rewrite, fit, scale, calibrate, repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from rewriter import store as stored
from rewriter.fit import FitReport, fit
from rewriter.graph import layers, module_of
from rewriter.influence import weigh
from rewriter.int8.clipping import least_damage_ranges
from rewriter.int8.scheme import QuantScheme
from rewriter.int8.simulate import Quantized, quantize
from rewriter.plan import Plan, copy_graph, rewrite, rule_named
from rewriter.ranges import profile
from rewriter.refine import refine
from rewriter.rules._whole import WholeModelRule

Batches = Sequence[Tensor | tuple[Tensor, ...]]
# Raised when the result of the repairs changes, so that stored ones are not reused.
VERSION = 1


@dataclass(frozen=True)
class Assembled:
    """A plan carried out: the quantized network, and how each fitted step came out."""

    quantized: Quantized
    fits: tuple[FitReport, ...]


def assemble(
    gm: fx.GraphModule,
    plan: Plan,
    scheme: QuantScheme,
    batches: Batches,
    store: Path | None = None,
    seed: int = 0,
) -> Assembled:
    """Carry out ``plan`` on a profiled canonical graph (``rewriter.profile``).

    Single places are rewritten and fitted first, then the rules of the whole model act on what came out, then int8
    ranges are measured, and at last weights and biases are repaired layer by layer. The graph's weights and structure are not
    touched; what was measured of it (``influence``) is kept in its nodes' meta for the next plan.

    Args:
        gm: canonical graph of the float network.
        plan: what to do.
        scheme: the target.
        batches: unlabelled calibration inputs, each (N, C, H, W).
        store: folder with fitted and repaired weights, shared by all who make the same thing.
        seed: of whatever is random in fitting.

    Raises:
        PlanError: the plan does not apply.
        QuantizeError: the calibration inputs are unusable.
    """
    whole = [s for s in plan.steps if isinstance(rule_named(s.rule), WholeModelRule)]
    single = Plan(tuple(s for s in plan.steps if s not in whole))
    fits = fit(gm, single, batches, scheme, store, seed)
    key = _key(gm, plan, scheme, batches, seed) if store is not None and whole else ""
    base = gm
    if single.steps:
        base = rewrite(gm, single, fits.weights)
    if any(isinstance(r := rule_named(s.rule), WholeModelRule) and r.weighs for s in whole):
        _measure(base, batches, again=bool(single.steps))
    rewritten = rewrite(base, Plan(tuple(whole)), facts={"scheme": scheme}) if whole else base
    if rewritten is gm:
        rewritten = copy_graph(gm)
    quantized = _repaired(rewritten, scheme, batches)
    del key
    return Assembled(quantized, fits.reports)


def _measure(gm: fx.GraphModule, batches: Batches, again: bool) -> None:
    """Write ranges and influences into the meta of a graph; those of the values before a rewrite are not those after it."""
    if again:
        for node in gm.graph.nodes:
            for name in ("channel_range", "influence", "weight_influence"):
                node.meta.pop(name, None)
        profile(gm, batches)
    if not any("influence" in n.meta for n in gm.graph.nodes):
        weigh(gm, batches)


def _repaired(gm: fx.GraphModule, scheme: QuantScheme, batches: Batches) -> Quantized:
    """Calibrate and repair a rewritten graph as its steps asked for; edits its annotations."""
    repairs: frozenset[str] = gm.meta.get("repairs", frozenset())
    quantized = quantize(gm, scheme, batches)
    if "ranges" in repairs:
        quantized = least_damage_ranges(quantized, batches)
    if repairs & {"biases", "rounding"}:
        quantized = refine(quantized, batches, repairs)
    return quantized
