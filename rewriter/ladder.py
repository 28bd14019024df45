"""The free remedies, one on top of the other: what int8 costs before anything is rewritten that costs MACs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import fx

from rewriter.damage.meaning import meanings
from rewriter.errors import RewriteError
from rewriter.graph import facts
from rewriter.plan import Plan, Step, rule_named
from rewriter.rules import Site

__all__ = [
    "AT_PLACES",
    "HEAD",
    "RANGES",
    "REMEDIES",
    "TAIL",
    "Rung",
    "Splits",
    "best",
    "climb",
    "exact_splits",
]

log = logging.getLogger(__name__)

# Rounding and biases come last, since they start from the ranges and scales.
REMEDIES: tuple[tuple[str, str], ...] = (
    ("better ranges", "refine_ranges"),
    ("equalization", "equalize"),
    ("bias correction", "correct_bias"),
    ("rounding", "round_weights"),
)
# The first so many are what the others start from.
STARTS = 2
# A split adds kernel calls, which MACs do not show: a rung of them is kept if it takes away this
# share of the damage.
SPLIT_GAIN = 0.2
# Rungs of such steps alone need less: the first costs nothing at all, the second conversions where convolutions write
# the sums' terms.
LEAST_GAIN = {"scale_norm": 0.0, "float_trunk": 0.05}
# Damage below which nothing is replaced that the float network misses.
FITTED_DAMAGE = 0.02
# Nothing is free that slows the file by more than this. What it slows it by is weighed to this power: 10 % more
# time are worth 38 % less damage.
FREE_TIME, TIME_PRICE = 1.03, 5.0


EMPTY = Plan()
SCALED = Step("equalize", "model")
Splits = Sequence[tuple[str, tuple[Step, ...]]]


class Measured(Protocol):
    """What the ladder reads of a plan's score."""

    @property
    def damage(self) -> float | None: ...

    @property
    def metric(self) -> float | None: ...

    @property
    def latency_ratio(self) -> float | None: ...


@dataclass(frozen=True)
class Rung:
    """One remedy on top of those kept before it.

    Args:
        name: in words; "plain int8" for the first.
        plan: what was measured.
        damage: of its outputs against the float network, lower is better; infinite where it failed.
        metric: of the task, None without labels.
        kept: whether it does less damage than the rungs kept before it.
        note: why it was not tried.
        latency_ratio: time of its file relative to plain int8; None where it is not known.
    """

    name: str
    plan: Plan
    damage: float
    metric: float | None
    kept: bool
    note: str = ""
    latency_ratio: float | None = None


def climb(
    gm: fx.GraphModule,
    score: Callable[[Plan], Measured],
    base: Plan = EMPTY,
    splits: Splits = (),
    max_latency_ratio: float | None = None,
) -> tuple[Rung, ...]:
    """Measure plain int8, then every free remedy on top of those that helped.

    At last the ranges and scales that the later remedies started from are tried without.
    Exact splits come first: while one range for boxes and scores, or for very uneven channels,
    leaves nothing of the answers, no other remedy can show what it is worth. A rung that slows the
    file is weighed, and one that slows it beyond the limit is not kept; of splits that are not kept together for that, each is tried
    alone, and those that were kept are tried without at last: what came later may have made them superfluous.

    Args:
        gm: profiled canonical graph.
        score: measures a plan (an evaluator; whatever it remembers is not measured again).
        base: steps that every rung has.
        splits: names and steps of the rungs that split layers, see ``exact_splits``.
        max_latency_ratio: longest time of a file, relative to plain int8; None: any.

    Returns:
        The rungs in order; ``best(rungs)`` is the plan to start from.
    """
    first = score(base)
    most = max_latency_ratio
    ratio = first.latency_ratio
    rungs = [Rung("plain int8", base, _damage(first), first.metric, True, latency_ratio=ratio)]
    tried: tuple[Step, ...] = ()
    exact = [entry for entry in splits if not _is_fitted(entry[1])]
    for name, steps in exact:  # on top of all before: one may show nothing without the next
        tried = (*tried, *steps)
        below = best(rungs)
        rungs.append(_split(score, below, name, tried, most))
        if _slows(rungs[-1], below):
            for step in steps if len(steps) > 1 else ():
                at = f"{name}, {step.anchor} alone"
                rungs.append(_split(score, best(rungs), at, (step,), most))
    for name, word in REMEDIES:
        rungs.append(_rung(gm, score, best(rungs), name, word, most))
    # what did not help alone may help on top of the rest
    for rung in rungs[1:-1]:
        if not rung.kept and not rung.note and rung.name in dict(REMEDIES):
            word = dict(REMEDIES)[rung.name]
            rungs.append(_rung(gm, score, best(rungs), f"{rung.name}, at last", word, most))
    # what helped early may do harm beside what came later
    for name, word in REMEDIES[:STARTS]:
        below = best(rungs)
        plan = Plan(tuple(s for s in below.plan.steps if s.rule != word or s in base.steps))
        if plan not in [r.plan for r in rungs]:
            rungs.append(_measured(score, below, f"without {name}", plan, below.damage, most))
    # what changes the float network as well: only for damage that nothing else takes away
    for name, steps in splits:
        if _is_fitted(steps) and best(rungs).damage > FITTED_DAMAGE:
            below = best(rungs)
            rungs.append(_split(score, below, name, steps, most))
            if SCALED not in below.plan.steps:  # which may pass now
                rungs.append(_split(score, below, f"{name}, equalized", (*steps, SCALED), most))
                better = rungs[-1].damage < best(rungs[:-1]).damage
                rungs[-1] = replace(rungs[-1], kept=rungs[-1].kept and better)
    for name, steps in splits:
        below = best(rungs)
        plan = Plan(tuple(s for s in below.plan.steps if s not in steps or s in base.steps))
        slower = (below.latency_ratio or 1.0) > FREE_TIME
        if slower and plan not in [r.plan for r in rungs]:
            bound = below.damage / (1 - SPLIT_GAIN)
            rungs.append(_measured(score, below, f"without {name}", plan, bound, most))
    return tuple(rungs)


def _is_fitted(steps: tuple[Step, ...]) -> bool:
    return any(rule_named(step.rule).contract == "approximate" for step in steps)


def _slows(rung: Rung, below: Rung) -> bool:
    """Whether a rung is not kept although it does less damage: because its file takes longer."""
    return not rung.kept and rung.damage < (1 - SPLIT_GAIN) * below.damage


def _damage(score: Measured) -> float:
    return float("inf") if score.damage is None else score.damage


def _rung(
    gm: fx.GraphModule,
    score: Callable[[Plan], Measured],
    below: Rung,
    name: str,
    word: str,
    most: float | None,
) -> Rung:
    site = next(iter(rule_named(word).match(gm)), None)
    plan = Plan((*below.plan.steps, Step(word, "model")))
    note = "the rule does not match" if site is None else site.blocked
    if note:
        return Rung(name, plan, float("inf"), None, kept=False, note=note)
    return _measured(score, below, name, plan, below.damage, most)


def _split(
    score: Callable[[Plan], Measured],
    below: Rung,
    name: str,
    steps: tuple[Step, ...],
    most: float | None,
) -> Rung:
    plan = Plan(tuple(dict.fromkeys((*below.plan.steps, *steps))))
    new = [step for step in steps if step not in below.plan.steps]
    gain = max((LEAST_GAIN.get(step.rule, SPLIT_GAIN) for step in new), default=SPLIT_GAIN)
    return _measured(score, below, name, plan, (1 - gain) * below.damage, most)


def _measured(
    score: Callable[[Plan], Measured],
    below: Rung,
    name: str,
    plan: Plan,
    bound: float,
    most: float | None,
) -> Rung:
    """The rung of a plan, which is kept where its damage is below a bound, the less so the longer its file takes."""
    try:
        found = score(plan)
    except RewriteError as cause:
        return Rung(name, plan, float("inf"), None, kept=False, note=str(cause))
    damage, ratio = _damage(found), found.latency_ratio
    slower = 1.0 if ratio is None else ratio / (below.latency_ratio or 1.0)
    if not 1 / FREE_TIME <= slower <= FREE_TIME:
        bound *= slower**-TIME_PRICE
    allowed = most is None or ratio is None or ratio <= most or slower < 1
    log.info("%s: damage %.4g, %.4g without", name, damage, below.damage)
    kept = damage < bound and allowed
    return Rung(name, plan, damage, found.metric, kept, latency_ratio=ratio)


def best(rungs: tuple[Rung, ...] | list[Rung]) -> Rung:
    """The last rung that was kept."""
    return next(r for r in reversed(rungs) if r.kept)


TAIL = "float_tail"


HEAD = "split_head_auto"


# Three groups recovered most in what was measured, two nearly as much.
RANGES = ("split_range_3", "split_range_2")


# Places are split by range that have this share of the damage of all layers, and this many at
# most.
SPLIT_DAMAGE_SHARE = 0.1


SPLIT_PLACES = 4


# The activations in front of the layers that are hurt most are replaced, at so many places at most.
REPLACE, REPLACED = "replace_activation_relu", 5
# One step at every place.
EVERYWHERE = (("layer norms scaled", "scale_norm"), ("residual trunks in float", "float_trunk"))


# All rules that rungs act with at single places.
AT_PLACES = (TAIL, HEAD, *RANGES, *(rule for _, rule in EVERYWHERE), REPLACE)


def exact_splits(
    gm: fx.GraphModule, sites: Sequence[Site], damage: Mapping[str, float]
) -> tuple[tuple[str, tuple[Step, ...]], ...]:
    """Rungs of steps at single places for ``rewriter.ladder.climb``; none where nothing matches.

    Those that are not exact are tried last there, on top of all remedies.

    Args:
        gm: profiled canonical graph.
        sites: of its rules.
        damage: of quantizing each layer alone, by node name.
    """
    free = [s for s in sites if not s.blocked]
    ends = [] if _classes(gm) else [s for s in free if s.rule in (TAIL, HEAD)]
    found = [
        ("outputs split", tuple(Step.at(s) for s in ends)),
        *((name, tuple(Step.at(s) for s in free if s.rule == rule)) for name, rule in EVERYWHERE),
        ("channels split by range", tuple(_by_range(free, damage))),
        ("activations replaced", tuple(_replaced(free, damage))),
    ]
    return tuple((name, steps) for name, steps in found if steps)


def _classes(gm: fx.GraphModule) -> bool:
    """Whether all that counts is one score for each class: of one kind, and so of one range."""
    fixed = facts.FIDELITY.get(gm)
    if fixed is not None:
        return fixed.only_classes
    kinds = {p.kind for meaning, _ in meanings(gm) for p in meaning.parts}
    return kinds <= {"logits", "probabilities"}


def _replaced(sites: Sequence[Site], damage: Mapping[str, float]) -> Iterator[Step]:
    """The activations between layers that are hurt, the most harmful first."""
    places = [s for s in sites if s.rule == REPLACE]
    harm = {
        s.anchor: sum(damage.get(n, 0.0) for n in dict.fromkeys((*s.nodes, *s.readers)))
        for s in places
    }
    least = SPLIT_DAMAGE_SHARE / 2 * sum(damage.values())
    for site in sorted(places, key=lambda s: -harm[s.anchor])[:REPLACED]:
        if harm[site.anchor] > least:
            yield Step.at(site)


def _by_range(sites: Sequence[Site], damage: Mapping[str, float]) -> Iterator[Step]:
    """Splits where layers are hurt most, none of which shares a layer with another.

    A layer is hurt by its input as much as by its weights: those that read the values count, the
    one that makes them does not.
    """
    best: dict[str, Site] = {}
    for rule in RANGES:
        for site in sites:
            if site.rule == rule:
                best.setdefault(site.anchor, site)
    harm = {
        a: sum(damage.get(n, 0.0) for n in (*s.nodes[1:], *s.readers)) for a, s in best.items()
    }
    least = SPLIT_DAMAGE_SHARE * sum(damage.values())
    taken: set[str] = set()
    for anchor in sorted(best, key=lambda a: -harm[a])[:SPLIT_PLACES]:
        if harm[anchor] > least and not taken.intersection(best[anchor].nodes):
            taken.update(best[anchor].nodes)
            yield Step(best[anchor].rule, anchor)
