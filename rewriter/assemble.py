"""From a plan to the quantized network that would ship: rewrite, fit, scale, calibrate, repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from rewriter.fit import FitReport, fit
from rewriter.influence import weigh
from rewriter.int8.clipping import least_damage_ranges
from rewriter.int8.scheme import QuantScheme
from rewriter.int8.simulate import Quantized, quantize
from rewriter.plan import Plan, copy_graph, rewrite, rule_named
from rewriter.ranges import profile
from rewriter.refine import refine
from rewriter.rules._whole import WholeModelRule
from rewriter.store import data_digest, graph_digest, key, load, save_to

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
    rules = [(s, rule_named(s.rule)) for s in plan.steps]
    whole = [(s, r) for s, r in rules if isinstance(r, WholeModelRule)]
    single = Plan(tuple(s for s, r in rules if not isinstance(r, WholeModelRule)))
    fits = fit(gm, single, batches, scheme, store, seed)
    base = rewrite(gm, single, fits.weights) if single.steps else gm
    facts = {"scheme": scheme}
    if not whole:
        made = base if single.steps else copy_graph(gm)
        return Assembled(
            quantize(made, scheme, batches, made.meta.get("calibration", "minmax")), fits.reports
        )
    name = ""
    if store is not None:
        versions = [f"{r.name} {r.version}" for _, r in whole]
        name = key(
            [
                graph_digest(base),
                data_digest(batches),
                repr(scheme),
                str(plan),
                str(VERSION),
                *versions,
            ]
        )
        found = load(store, name)
        if found is not None:
            shape = Plan(tuple(s for s, r in whole if r.replaces))
            made = rewrite(base, shape, facts=facts)
            return Assembled(_restored(made, found, scheme, batches), fits.reports)
    if any(r.weighs for _, r in whole):
        _measure(base, batches, again=bool(single.steps))
    made = rewrite(base, Plan(tuple(s for s, _ in whole)), facts=facts)
    quantized = _repaired(made, scheme, batches)
    if store is not None:
        save_to(store, name, *_record(quantized))
    return Assembled(quantized, fits.reports)


def _measure(gm: fx.GraphModule, batches: Batches, again: bool) -> None:
    """Write ranges and influences into the meta of a graph; those of the values before a rewrite are not those after it."""
    if again:
        for node in gm.graph.nodes:
            for known in ("channel_range", "influence", "weight_influence"):
                node.meta.pop(known, None)
        profile(gm, batches)
    if not any("influence" in n.meta for n in gm.graph.nodes):
        weigh(gm, batches)


def _repaired(gm: fx.GraphModule, scheme: QuantScheme, batches: Batches) -> Quantized:
    """Calibrate and repair a rewritten graph as its steps asked for; edits its annotations."""
    repairs: frozenset[str] = gm.meta.get("repairs", frozenset())
    quantized = quantize(gm, scheme, batches, gm.meta.get("calibration", "minmax"))
    if "ranges" in repairs:
        quantized = least_damage_ranges(quantized, batches)
    if repairs & {"biases", "rounding"}:
        quantized = refine(quantized, batches, repairs)
    return quantized


def _record(quantized: Quantized) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the rules of the whole model made, apart from the structure: weights, scales, ranges."""
    tensors = {f"state.{k}": v for k, v in quantized.gm.state_dict().items()}
    tensors |= {f"scale.{k}": v for k, v in quantized.calibration.weights.items()}
    return tensors, {"ranges": quantized.calibration.values}


def _restored(
    gm: fx.GraphModule,
    found: tuple[dict[str, Tensor], dict[str, Any]],
    scheme: QuantScheme,
    batches: Batches,
) -> Quantized:
    """The inverse of ``_record``, on a graph of the same structure; edits gm."""
    tensors, facts = found
    for path, value in tensors.items():
        if path.startswith("state."):
            owner, _, name = path.removeprefix("state.").rpartition(".")
            module = gm.get_submodule(owner)
            if name in dict(module.named_buffers(recurse=False)):
                setattr(module, name, value)
            else:
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    quantized = quantize(gm, scheme, batches, gm.meta.get("calibration", "minmax"))
    weights = {k.removeprefix("scale."): v for k, v in tensors.items() if k.startswith("scale.")}
    ranges = {k: (low, high) for k, (low, high) in facts["ranges"].items()}
    calibration = replace(quantized.calibration, weights=weights, values=ranges)
    return replace(quantized, calibration=calibration)
