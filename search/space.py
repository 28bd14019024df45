"""The search space: one categorical choice per anchor, "keep" or one of the answers that a rule
has for it.

Also what is worth trying before any search: the network as it is, the most harmful layers left in
float, every single answer for them, and the plans that an additive model of the damage predicts
to be best.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rewriter.plan import Plan, Step, rule_named
from rewriter.rules import Site
from search.records import Array

log = logging.getLogger(__name__)

KEEP = "keep"
KEEP_FLOAT = "keep_float"
CUMULATIVE = (1, 2, 3, 5, 8)
LIMIT = 24  # anchors: with two answers each, 3**24 plans: TPE has seen spaces of this size do well within 100 trials


@dataclass(frozen=True)
class Budget:
    """Upper bounds that a plan must meet to be proposed or to be on the front; None where there is none."""

    macs: float | None = None
    float_layers: int | None = None

    def meets(self, macs: float, float_layers: int) -> bool:
        return (self.macs is None or macs <= self.macs) and (
            self.float_layers is None or float_layers <= self.float_layers
        )


@dataclass(frozen=True)
class Space:
    """Every plan that the search may propose.

    Attributes:
        choices: Per anchor, most harmful first: ``keep`` and the names of the rules that may act
            there.
        nodes: Per step, the names of all nodes that it needs for itself; none where its rule
            shares them.
        extra_macs: Per step, the multiply-accumulates that it adds to the network as it is.
        macs: Multiply-accumulates of the network as it is.
        budget: What each proposed plan must meet.
        dropped: Anchors left out because their layers do no harm, least harmful last.
    """

    choices: Mapping[str, tuple[str, ...]]
    nodes: Mapping[Step, frozenset[str]]
    extra_macs: Mapping[Step, int]
    macs: int
    budget: Budget = Budget()
    dropped: tuple[str, ...] = ()
    _rank: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rank", {anchor: i for i, anchor in enumerate(self.choices)})

    @property
    def product(self) -> int:
        """Number of combinations of choices, valid or not."""
        return math.prod(len(answers) for answers in self.choices.values())

    def steps(self) -> list[Step]:
        return [Step(r, anchor) for anchor, rules in self.choices.items() for r in rules[1:]]

    def predicted_macs(self, plan: Plan) -> int:
        return self.macs + sum(self.extra_macs.get(step, 0) for step in plan.steps)

    def plan(self, choice: Mapping[str, str]) -> Plan:
        """The valid plan for a choice per anchor.

        Steps are taken in the order of the harm that their layers do; a step that needs a node of
        one taken before, or that goes over the budget, is left out. So each choice has one plan,
        whatever order it is written in.
        """
        wanted = [Step(choice[a], a) for a in self.choices if choice.get(a, KEEP) != KEEP]
        return self.repair(wanted)

    def repair(self, wanted: Iterable[Step]) -> Plan:
        """The steps of `wanted` that fit together and into the budget, as a plan."""
        last = len(self._rank)
        taken: list[Step] = []
        used: set[str] = set()
        macs, floats = self.macs, 0
        for step in sorted(
            set(wanted), key=lambda s: (self._rank.get(s.anchor, last), s.rule, s.anchor)
        ):
            needs = self.nodes.get(step)
            if needs is None or needs & used:
                continue
            more_macs = macs + self.extra_macs.get(step, 0)
            more_floats = floats + (step.rule == KEEP_FLOAT)
            if not self.budget.meets(more_macs, more_floats):
                continue
            taken.append(step)
            used |= needs
            macs, floats = more_macs, more_floats
        return Plan(tuple(taken))

    def choice(self, plan: Plan) -> dict[str, str] | None:
        """The choice per anchor that stands for a plan, None where the plan is not in the space."""
        result = dict.fromkeys(self.choices, KEEP)
        for step in plan.steps:
            if step.rule not in self.choices.get(step.anchor, ()):
                return None
            result[step.anchor] = step.rule
        return result

    def all_plans(self, limit: int) -> list[Plan] | None:
        """Every valid plan once, None where there may be more than `limit` combinations."""
        if self.product > limit:
            return None
        combinations = itertools.product(*self.choices.values())
        plans = (
            self.plan(dict(zip(self.choices, values, strict=True))) for values in combinations
        )
        return list(dict.fromkeys(plans))


def make_space(
    sites: Sequence[Site],
    damage: Mapping[str, float],
    extra_macs: Mapping[Step, int],
    macs: int,
    budget: Budget | None = None,
    limit: int = LIMIT,
) -> Space:
    """The space of the sites of a network, most harmful anchors first.

    Args:
        sites: Places where a rule may act; blocked ones are left out.
        damage: Damage of quantizing each weighted layer alone, by node name. A site counts with
            the sum over its nodes; a site of which no node is known (a rule on the whole network)
            is always kept.
        extra_macs: What each step adds.
        macs: Cost of the network as it is.
        budget: Steps that alone exceed it are left out.
        limit: Anchors kept at most.
    """
    budget = budget or Budget()
    free = [s for s in sites if not s.blocked]
    steps = {Step(s.rule, s.nodes[0]): frozenset(s.nodes) for s in free}
    shared = {step for step in steps if not rule_named(step.rule).exclusive}
    usable = {
        step: nodes
        for step, nodes in steps.items()
        if budget.meets(macs + extra_macs.get(step, 0), int(step.rule == KEEP_FLOAT))
    }
    rules: dict[str, list[str]] = {}
    harm: dict[str, float] = {}
    for step, nodes in usable.items():
        rules.setdefault(step.anchor, []).append(step.rule)
        known = [damage[n] for n in nodes if n in damage]
        harm[step.anchor] = max(
            harm.get(step.anchor, -math.inf), sum(known) if known else math.inf
        )
    ranked = sorted(rules, key=lambda a: -harm[a])  # stable: graph order among equals
    kept, dropped = ranked[:limit], tuple(ranked[limit:])
    if dropped:
        log.info(
            "space: %d of %d anchors kept; left out: those whose damage is at most %.3g",
            len(kept), len(ranked), harm[dropped[0]],
        )  # fmt: skip
    return Space(
        choices={a: (KEEP, *rules[a]) for a in kept},
        nodes={
            step: frozenset() if step in shared else nodes
            for step, nodes in usable.items()
            if step.anchor in set(kept)
        },
        extra_macs={s: extra_macs.get(s, 0) for s in usable},
        macs=macs,
        budget=budget,
        dropped=dropped,
    )


def reference_plans(
    ranked: Sequence[str], space: Space, counts: Sequence[int] = CUMULATIVE
) -> list[Plan]:
    """The empty plan, then the most harmful layers left in float, one more at a time.

    These are what the front is compared with, so they ignore the budget.

    Args:
        ranked: Node names of the weighted layers, most harmful first.
        space: Where the steps must exist.
        counts: How many layers.
    """
    known = [Step(KEEP_FLOAT, a) for a in ranked if KEEP_FLOAT in space.choices.get(a, ())]
    plans = [Plan(())] + [Plan(tuple(known[:n])) for n in counts if n <= len(known)]
    return list(dict.fromkeys(plans))


def single_plans(space: Space, top: int = 8) -> list[Plan]:
    """Each single answer, other than leaving it in float, for the most harmful anchors."""
    anchors = [a for a, rules in space.choices.items() if set(rules) - {KEEP, KEEP_FLOAT}][:top]
    steps = [Step(r, a) for a in anchors for r in space.choices[a] if r not in (KEEP, KEEP_FLOAT)]
    return [plan for plan in (space.repair([s]) for s in steps) if plan.steps]


def predicted_front(
    space: Space, gain: Mapping[Step, float], total: float, most: int = 12
) -> list[tuple[Plan, float]]:
    """The exact Pareto front in (MACs, damage) under the additive model, by dynamic programming.

    The damage of a plan is predicted as ``total`` minus the sum of the gains of its steps.
    Anchors whose steps exclude each other are decided together; after each such group only the
    partial plans that no other beats in (MACs, float layers, damage) go on.

    Args:
        space: Choices, costs and budget.
        gain: Damage that a step takes away; steps not named take nothing away and are not used.
        total: Damage of the empty plan.
        most: Plans returned at most, spread evenly over the front.

    Returns:
        Plans, cheapest first, with their predicted damage.

    Source: Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, chapter 11 (multiple choice,
        dominance).
    """
    columns = np.array([[space.macs, 0.0, total]])
    taken: list[tuple[Step, ...]] = [()]
    for group in _groups(space, {s for s, g in gain.items() if g > 0}):
        more = np.array([
            [sum(space.extra_macs.get(s, 0) for s in steps), sum(s.rule == KEEP_FLOAT for s in steps),
             -sum(gain[s] for s in steps)]
            for steps in group
        ])  # fmt: skip
        grown = (columns[:, None] + more).reshape(-1, 3)
        kept = _unbeaten(grown, space.budget)
        taken = [(*taken[i // len(group)], *group[i % len(group)]) for i in kept.tolist()]
        columns = grown[kept]
    order = np.lexsort((columns[:, 2], columns[:, 0]))
    lowest = np.minimum.accumulate(columns[order, 2])
    best = order[np.append(True, lowest[1:] < lowest[:-1])]
    if len(best) > most:
        best = best[np.unique(np.linspace(0, len(best) - 1, most).round().astype(int))]
    return [(Plan(taken[i]), max(float(columns[i, 2]), 0.0)) for i in best.tolist()]


def _groups(space: Space, steps: set[Step]) -> Iterator[list[tuple[Step, ...]]]:
    """Valid combinations of the steps of each set of anchors that exclude each other, the empty one first."""
    by_anchor: dict[str, list[Step]] = {}
    for step in space.steps():
        if step in steps:
            by_anchor.setdefault(step.anchor, []).append(step)
    anchors = list(by_anchor)
    touched = {a: frozenset().union(*(space.nodes[s] for s in by_anchor[a])) for a in anchors}
    seen: set[str] = set()
    for anchor in anchors:
        if anchor in seen:
            continue
        group, frontier = [], [anchor]
        seen.add(anchor)
        while frontier:
            here = frontier.pop()
            group.append(here)
            near = [a for a in anchors if a not in seen and touched[a] & touched[here]]
            seen.update(near)
            frontier.extend(near)
        group.sort(key=anchors.index)
        # A group too large to enumerate keeps its most harmful anchors; the search itself covers
        # the rest.
        while math.prod(1 + len(by_anchor[a]) for a in group) > 4096:
            group.pop()
        combinations = itertools.product(*([None, *by_anchor[a]] for a in group))
        picked = (tuple(s for s in values if s is not None) for values in combinations)
        yield [values for values in picked if _apart([space.nodes[s] for s in values])]


def _apart(needs: Sequence[frozenset[str]]) -> bool:
    return sum(map(len, needs)) == len(frozenset().union(*needs))


def _unbeaten(columns: Array, budget: Budget, most: int = 4000) -> NDArray[np.intp]:
    """Rows of (MACs, float layers, damage) in the budget that no other beats; thinned evenly where there are too many."""
    macs, floats, damage = columns.T
    allowed = np.ones(len(columns), dtype=bool)
    if budget.macs is not None:
        allowed &= macs <= budget.macs
    if budget.float_layers is not None:
        allowed &= floats <= budget.float_layers
    order = np.lexsort((damage, floats, macs))
    order = order[allowed[order]]
    floats, damage = floats[order], damage[order]
    keep = np.ones(len(order), dtype=bool)
    for count in np.unique(floats):
        # the least damage so far at no more float layers than this
        least = np.minimum.accumulate(np.where(floats <= count, damage, np.inf))
        here = np.flatnonzero(floats == count)
        here = here[here > 0]
        keep[here] &= damage[here] < least[here - 1]
    kept = order[keep]
    if len(kept) > most:
        kept = kept[np.linspace(0, len(kept) - 1, most).round().astype(int)]
    return kept
