"""From a plan to the quantized network that would ship: rewrite, fit, scale, calibrate, repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from rewriter.damage.grouping import fidelity_of
from rewriter.damage.measured import MEASURED, changed_nodes, measure, measure_changed
from rewriter.errors import PlanError, RewriteError
from rewriter.fitting.fit import FitReport, fit
from rewriter.graph import facts
from rewriter.graph.edit import copy_graph
from rewriter.graph.lookup import layers
from rewriter.int8.annotate import annotate
from rewriter.int8.calibrate import Calibration, Method, ValueStats
from rewriter.int8.scheme import QuantScheme
from rewriter.int8.simulate import Quantized
from rewriter.plan import Plan, Step, rewrite, rule_named
from rewriter.repair.alike import Alike
from rewriter.repair.bias_and_rounding import refine
from rewriter.repair.known_ranges import calibrated, refined
from rewriter.rules._model_rule import WholeModelRule
from rewriter.rules.add_residual_weights import settle_residuals
from rewriter.storage.cache import Store, load, save_to
from rewriter.storage.digest import data_digest, graph_digest, key

__all__ = ["Assembled", "assemble", "prepare", "record", "repaired", "restored", "rewritten"]

Batches = Sequence[Tensor | tuple[Tensor, ...]]
# Raised when the result of the repairs changes, so that stored ones are not reused.
VERSION = 8


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
    store: Store | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Assembled:
    """Carry out ``plan`` on a profiled canonical graph (``rewriter.profile``).

    Single places are rewritten and fitted first, then the rules of the whole model act on what came out, then int8
    ranges are measured, and at last weights and biases are repaired layer by layer. The graph's weights and structure are not
    touched; what was measured of it (``influence``, and the damage where none is fixed yet) is kept in its
    meta for the next plan.

    Args:
        gm: canonical graph of the float network.
        plan: what to do.
        scheme: the target.
        batches: unlabelled calibration inputs, each (N, C, H, W).
        store: where fitted and repaired weights are kept, shared by all who make the same thing.
        seed: of whatever is random in fitting.
        device: where weights are fitted; all else runs on the CPU.

    Raises:
        PlanError: the plan does not apply.
        QuantizeError: the calibration inputs are unusable.
    """
    fidelity_of(gm, batches)
    base, whole, fits = _single(gm, plan, scheme, batches, store, seed, device)
    name = ""
    if store is not None and whole.steps:
        name = _record_name(base, plan, whole, scheme, batches)
        found = load(store, name)
        if found is not None:
            shape = Plan(tuple(s for s in whole.steps if _whole(s).replaces))
            made = rewrite(base, shape, facts={"scheme": scheme})
            return Assembled(restored(made, found, scheme), fits)
    like = _builds_on_another(plan, whole)
    alike = _alike(gm, whole, scheme, batches, store) if like else None
    scaled = _scaled(base, whole, plan, scheme, batches, store, gm, alike)
    quantized = repaired(scaled, scheme, batches, store, alike)
    if store is not None and name:
        save_to(store, name, *record(quantized))
    return Assembled(quantized, fits)


def _record_name(
    base: fx.GraphModule, plan: Plan, whole: Plan, scheme: QuantScheme, batches: Batches
) -> str:
    """Under what an assembled plan is stored."""
    rules = [rule_named(s.rule) for s in whole.steps]
    return key(
        [
            graph_digest(base),
            data_digest(batches),
            scheme.identity,
            str(plan),
            str(VERSION),
            str(facts.CALIBRATION.get(base)),
            fidelity_of(base, batches).digest,
            *(f"{r.name} {r.version}" for r in rules),
        ]
    )


def prepare(
    gm: fx.GraphModule,
    batches: Batches,
    store: Store | None = None,
    plan: Plan | None = None,
    scheme: QuantScheme | None = None,
) -> None:
    """Measure of the network as it is what plans without single places need; otherwise the first such plan does.

    Args:
        gm: profiled canonical graph.
        batches: calibration inputs.
        store: where it is kept.
        plan: a plan that is assembled next, in a process forked from this one: what it takes over from its repairs alone is
            loaded here, once for all such processes, where it is stored.
        scheme: its target.
    """
    measure(gm, batches, store, again=False)
    if plan is None or scheme is None or store is None:
        return
    whole = Plan(tuple(s for s in plan.steps if isinstance(rule_named(s.rule), WholeModelRule)))
    if _builds_on_another(plan, whole):
        name = _record_name(gm, whole, whole, scheme, batches)
        if load(store, name) is not None:
            _alike(gm, whole, scheme, batches, store)


def rewritten(
    gm: fx.GraphModule,
    plan: Plan,
    scheme: QuantScheme,
    batches: Batches,
    store: Store | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> fx.GraphModule:
    """The float network of a plan: rewritten, fitted and scaled, but neither calibrated nor repaired; see ``assemble``."""
    base, whole, _ = _single(gm, plan, scheme, batches, store, seed, device)
    like = _builds_on_another(plan, whole)
    alike = _alike(gm, whole, scheme, batches, store) if like else None
    return _scaled(base, whole, plan, scheme, batches, store, gm, alike)


def _builds_on_another(plan: Plan, whole: Plan) -> bool:
    """Whether a plan is the rules of the whole model on top of exact steps: it takes over what they made of the network itself."""
    rules = [rule_named(s.rule) for s in plan.steps if s not in whole.steps]
    acts = any(_whole(s).weighs or _whole(s).repair for s in whole.steps)
    return bool(rules) and acts and all(r.contract != "approximate" for r in rules)


# What the rules of the whole model made of networks that are still alive; of each the last few sets of rules.
_alikes: Any = WeakIdKeyDictionary()
KEPT = 2


def _alike(
    gm: fx.GraphModule, whole: Plan, scheme: QuantScheme, batches: Batches, store: Store | None
) -> Alike | None:
    """The network with the rules of the whole model alone, before and after its repairs; None where they do not apply to it."""
    parts = [graph_digest(gm), data_digest(batches), scheme.identity, str(whole), str(VERSION)]
    name = key([*parts, str(facts.CALIBRATION.get(gm)), fidelity_of(gm, batches).digest])
    known: dict[str, Alike] = _alikes.setdefault(gm, {})
    if name not in known:
        try:
            before = rewritten(gm, whole, scheme, batches, store)
            made = assemble(gm, whole, scheme, batches, store).quantized
        except PlanError:
            return None
        method: Method = facts.CALIBRATION.get(before, "minmax")
        ranges = calibrated(before, scheme, batches, method, store).calibration.values
        while len(known) >= KEPT:
            known.pop(next(iter(known)))
        known[name] = Alike(before, ranges, made)
    return known[name]


def _single(
    gm: fx.GraphModule,
    plan: Plan,
    scheme: QuantScheme,
    batches: Batches,
    store: Store | None,
    seed: int,
    device: str,
) -> tuple[fx.GraphModule, Plan, tuple[FitReport, ...]]:
    """The graph after the steps at single places, the steps that are left, and how the fits came out."""
    whole = Plan(tuple(s for s in plan.steps if isinstance(rule_named(s.rule), WholeModelRule)))
    single = Plan(tuple(s for s in plan.steps if s not in whole.steps))
    if _builds_on_another(plan, whole) and any(_whole(s).weighs for s in whole.steps):
        measure(gm, batches, store, again=False)  # what the rewritten graph inherits
    fits = fit(gm, single, batches, scheme, store, seed, device=device)
    base = rewrite(gm, single, fits.weights, {"scheme": scheme}) if single.steps else gm
    return base, whole, fits.reports


def _scaled(
    base: fx.GraphModule,
    whole: Plan,
    plan: Plan,
    scheme: QuantScheme,
    batches: Batches,
    store: Store | None,
    gm: fx.GraphModule,
    alike: Alike | None,
) -> fx.GraphModule:
    """The graph after the rules of the whole model.

    Args:
        base: the graph after the steps at single places.
        whole: the other steps.
        plan: all steps.
        scheme: the target.
        batches: calibration inputs.
        store: where measurements are kept.
        gm: the network as it is.
        alike: what the same rules make of it; None where this plan has nothing in common with that.
    """
    single = len(plan.steps) > len(whole.steps)
    if not whole.steps:
        return base if single else copy_graph(base)
    if any(_whole(s).weighs for s in whole.steps):
        again = any(
            rule_named(s.rule).contract != "annotation" for s in plan.steps if s not in whole.steps
        )
        if alike is None or not again:
            measure(base, batches, store, again)
        else:
            measure_changed(base, gm, batches, store)
    told: dict[str, Any] = {"scheme": scheme}
    if alike is not None:
        scales = facts.LOG_SCALES.get(alike.before, {})
        changed = {n.name for n in changed_nodes(base, gm)}
        told["known_scales"] = {k: v for k, v in scales.items() if k not in changed}
    return rewrite(base, whole, facts=told)


def _whole(step: Step) -> WholeModelRule:
    rule = rule_named(step.rule)
    assert isinstance(rule, WholeModelRule)
    return rule


def repaired(
    gm: fx.GraphModule,
    scheme: QuantScheme,
    batches: Batches,
    store: Store | None = None,
    alike: Alike | None = None,
) -> Quantized:
    """Calibrate and repair a rewritten graph as its steps asked for; edits its annotations.

    What earlier plans share with this one (ranges of the same network, layers repaired alike) is taken from the store.
    """
    settle_residuals(gm)
    repairs: frozenset[str] = facts.REPAIRS.get(gm, frozenset())
    quantized = calibrated(gm, scheme, batches, facts.CALIBRATION.get(gm, "minmax"), store)
    if "ranges" in repairs:
        quantized = refined(quantized, batches, store, alike)
    if repairs & {"biases", "rounding"}:
        quantized = refine(quantized, batches, repairs, store, alike)
    return quantized


def record(quantized: Quantized) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the rules of the whole model made, apart from the structure: weights, scales, ranges, and what calibration saw."""
    found = quantized.calibration
    tensors = {f"state.{k}": v for k, v in quantized.gm.state_dict().items()}
    tensors |= {f"scale.{k}": v for k, v in found.weights.items()}
    tensors |= {f"low.{k}": s.channel_low for k, s in found.stats.items()}
    tensors |= {f"high.{k}": s.channel_high for k, s in found.stats.items()}
    noise = {n.name: facts.NOISE.of(n) for n in layers(quantized.gm) if facts.NOISE.known(n)}
    return tensors, {"ranges": found.values, "samples": found.samples, "noise": noise}


def reassemble(
    quantized: Quantized, plan: Plan, original: fx.GraphModule, gm: fx.GraphModule
) -> fx.GraphModule:
    """The float network of an assembled plan on another graph of the same network, such as one for other input sizes.

    Args:
        quantized: what ``assemble`` made of ``plan``.
        plan: the plan.
        original: the profiled graph that it was made from.
        gm: canonical graph with the same layers under the same names.

    Raises:
        RewriteError: the plan does not apply there, or makes other layers there.
    """
    gm = copy_graph(gm)
    known = {n.name: n for n in original.graph.nodes}
    for node in gm.graph.nodes:  # what rules decide by
        if node.name in known:
            facts.keep(node, known[node.name], *map(facts.named, MEASURED))
    rules = [(s, rule_named(s.rule)) for s in plan.steps]
    single = Plan(tuple(s for s, r in rules if not isinstance(r, WholeModelRule)))
    whole = Plan(tuple(s for s, r in rules if isinstance(r, WholeModelRule) and r.replaces))
    told = {"scheme": quantized.scheme}
    made = rewrite(rewrite(gm, single, facts=told), whole, facts=told)
    if {n.name for n in layers(made)} != {n.name for n in layers(quantized.gm)}:
        raise RewriteError(f"plan {plan}: makes other layers for inputs {facts.EXAMPLE.of(gm)}")
    _put(made, quantized.gm.state_dict())
    return made


def _put(gm: fx.GraphModule, state: Mapping[str, Tensor]) -> None:
    """Edit gm: set all parameters and buffers, new biases too."""
    for path, value in state.items():
        owner, _, name = path.rpartition(".")
        module = gm.get_submodule(owner)
        if name in dict(module.named_buffers(recurse=False)):
            setattr(module, name, value)
        else:
            setattr(module, name, nn.Parameter(value, requires_grad=False))


def restored(
    gm: fx.GraphModule,
    found: tuple[dict[str, Tensor], dict[str, Any]],
    scheme: QuantScheme,
) -> Quantized:
    """The inverse of ``record``, on a graph of the same structure; edits gm. Nothing is run."""
    tensors, rest = found
    kinds: dict[str, dict[str, Tensor]] = {"state": {}, "scale": {}, "low": {}, "high": {}}
    for path, value in tensors.items():
        kind, _, name = path.partition(".")
        kinds[kind][name] = value
    _put(gm, kinds["state"])
    annotate(gm, scheme)
    stats = {
        name: ValueStats(
            float(low.min()), float(kinds["high"][name].max()), low, kinds["high"][name]
        )
        for name, low in kinds["low"].items()
    }
    for node in layers(gm):
        if node.name in rest.get("noise", {}):
            facts.NOISE.put(node, rest["noise"][node.name])
    ranges = {k: (low, high) for k, (low, high) in rest["ranges"].items()}
    return Quantized(gm, Calibration(ranges, kinds["scale"], stats, rest["samples"]), scheme)
