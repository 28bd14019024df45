"""The search space: one categorical choice per place, "keep" or a rule that acts there.

Also what is worth trying before any search: the network as it is, the most harmful layers left in
float, every single answer for them, and the plans that an additive model of the damage predicts
to be best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from rewriter.plan import Plan, Step, rule_named
from rewriter.rules import Site
from search.run_dir.scores import Array

KEEP = "keep"
KEEP_FLOAT = "keep_float"
CUMULATIVE = (1, 2, 3, 5, 8)
LIMIT = 24  # anchors
WORTH = 1e-3  # of all MACs: what saves less is not worth a choice
HARMLESS = 0.01  # of the harm of the worst anchor: below that, in a large space, not worth a trial


@dataclass(frozen=True)
class Budget:
    """Bounds that a plan must meet to be proposed or on the front; None: no bound.

    Attributes:
        macs: Most of them.
        float_layers: The same of layers in float.
        least_macs: What a proposal saves no more below.
    """

    macs: float | None = None
    float_layers: int | None = None
    least_macs: float | None = None

    def meets(self, macs: float, float_layers: int) -> bool:
        return (self.macs is None or macs <= self.macs) and (
            self.float_layers is None or float_layers <= self.float_layers
        )


@dataclass(frozen=True)
class Space:
    """Every plan that the search may propose.

    Attributes:
        choices: Per slot, most harmful first: ``keep`` and the names of the rules that may act
            there.
        nodes: Per step, what it needs for itself, such as the names of nodes; nothing where its
            rule shares them. Two steps that need the same exclude each other.
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
        object.__setattr__(self, "_rank", {slot: i for i, slot in enumerate(self.choices)})

    @property
    def product(self) -> int:
        """Number of combinations of choices, valid or not."""
        return math.prod(len(answers) for answers in self.choices.values())

    def steps(self) -> list[Step]:
        return [_step(slot, rule) for slot, rules in self.choices.items() for rule in rules[1:]]

    def predicted_macs(self, plan: Plan) -> int:
        scales = [s for s in plan.steps if rule_named(s.rule).scales]
        macs = self.macs + sum(self.extra_macs.get(s, 0) for s in plan.steps if s not in scales)
        for step in scales:
            macs = round(macs * (1 + self.extra_macs.get(step, 0) / self.macs))
        return macs

    def plan(self, choice: Mapping[str, str]) -> Plan:
        """The valid plan for a choice per slot.

        Steps are taken in the order of the harm that their layers do; a step that needs a node of
        one taken before, or that goes over the budget, is left out. So each choice has one plan,
        whatever order it is written in.
        """
        wanted = [_step(s, choice[s]) for s in self.choices if choice.get(s, KEEP) != KEEP]
        return self.repair(wanted)

    def repair(self, wanted: Iterable[Step]) -> Plan:
        """The steps of `wanted` that fit together and into the budget, as a plan."""
        last = len(self._rank)
        ranked = sorted(
            set(wanted), key=lambda s: (self._rank.get(slot_of(s), last), s.rule, s.anchor)
        )
        # what is saved later may pay for what comes first
        saved = sum(min(0, self.extra_macs.get(s, 0)) for s in self._together(ranked, -math.inf))
        return Plan(tuple(self._together(ranked, self.macs + saved)))

    def _together(self, ranked: Sequence[Step], macs: float) -> list[Step]:
        """The steps that fit with those before them, and where they add MACs to so many, into the budget."""
        taken: list[Step] = []
        used: set[str] = set()
        floats, left = 0, self.macs
        for step in ranked:
            needs = self.nodes.get(step)
            more = self.extra_macs.get(step, 0)
            if needs is None or needs & used:
                continue
            spent = macs + max(0, more) if more > 0 else 0.0
            if not self.budget.meets(spent, floats + in_float(step)):
                continue
            if more < 0 and left + more < (self.budget.least_macs or 0.0):
                continue
            taken.append(step)
            used |= needs
            macs, left = macs + max(0, more), left + min(0, more)
            floats += in_float(step)
        return taken

    def choice(self, plan: Plan) -> dict[str, str] | None:
        """The choice per slot that stands for a plan, None where it is not in the space."""
        result = dict.fromkeys(self.choices, KEEP)
        for step in plan.steps:
            slot = slot_of(step)
            if step.rule not in self.choices.get(slot, ()) or result[slot] != KEEP:
                return None
            result[slot] = step.rule
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


def slot_of(step: Step) -> str:
    """Name of the choice that a step belongs to.

    At one anchor the rules of one stage exclude each other and share a slot; a rule that excludes
    no other has a slot of its own.
    """
    rule = rule_named(step.rule)
    if not rule.exclusive:
        return f"{step.anchor}/{rule.name}"
    return step.anchor if rule.stage == "replace" else f"{step.anchor}/{rule.stage}"


def saves(site: Site | Step) -> bool:
    """Whether a step takes MACs away and is no answer to what int8 does."""
    return rule_named(site.rule).saves


def in_float(site: Site | Step) -> int:
    """How many layers a step leaves in float."""
    return rule_named(site.rule).float_layers


def make_space(
    sites: Sequence[Site],
    damage: Mapping[str, float],
    price: Callable[[Step], int | None],
    macs: int,
    budget: Budget | None = None,
    limit: int = LIMIT,
    always: Iterable[str] = (),
    clashes: Callable[[Sequence[Site]], Iterable[tuple[Step, Step]]] = lambda sites: (),
) -> Space:
    """The space of the sites of a network, most harmful anchors first.

    Args:
        sites: Places where a rule may act; blocked ones are left out.
        damage: Damage of quantizing each weighted layer alone, by node name. A site counts with
            the sum over its nodes and readers; a site of which no node is known (a rule on the whole network)
            is always kept.
        price: MACs that a step adds, None where it does not apply after all. Asked only for the
            anchors that are kept.
        macs: Cost of the network as it is.
        budget: Steps that alone exceed it are left out.
        limit: Anchors kept at most; where there are more, harmless ones are left out as well.
        always: Anchors that are kept whatever harm they do.
        clashes: Pairs of steps at the sites that are kept which exclude each other, although no
            node takes part in both.
    """
    budget = budget or Budget()
    places: dict[str, list[Site]] = {}
    harm: dict[str, float] = {}
    for site in sites:
        if not site.blocked and not saves(site):
            anchor = site.nodes[0]
            places.setdefault(anchor, []).append(site)
            known = [damage[n] for n in (*site.nodes, *site.readers) if n in damage]
            here = sum(known) if known else math.inf
            harm[anchor] = max(harm.get(anchor, -math.inf), here)
    ranked = sorted(places, key=lambda a: -harm[a])  # stable: graph order among equals
    if len(ranked) > limit:
        worst = max((h for h in harm.values() if h < math.inf), default=0.0)
        limit = min(limit, sum(harm[a] >= HARMLESS * worst for a in ranked))
    always = set(always)
    kept = [*ranked[:limit], *(a for a in ranked[limit:] if a in always)]
    choices: dict[str, list[str]] = {}
    nodes: dict[Step, frozenset[str]] = {}
    extra: dict[Step, int] = {}
    usable: list[Site] = []
    thin = [site for site in sites if saves(site) and not site.blocked]
    for site in [*(site for anchor in kept for site in places[anchor]), *thin]:
        step = Step.at(site)
        added = price(step)
        if added is None or (saves(site) and added > -WORTH * macs):
            continue
        # what is saved elsewhere may pay for what alone is above the budget
        spent = min(macs, budget.least_macs or macs) + added if added > 0 else 0.0
        if not budget.meets(spent, in_float(site)):
            continue
        rule = rule_named(site.rule)
        extra[step] = added
        nodes[step] = frozenset(f"{rule.stage}:{n}" for n in site.nodes if rule.exclusive)
        choices.setdefault(slot_of(step), [KEEP]).append(site.rule)
        usable.append(site)
    for pair in clashes(usable):
        for step in pair:
            nodes[step] |= {" ".join(map(str, pair))}
    return Space(
        choices={slot: tuple(rules) for slot, rules in choices.items()},
        nodes=nodes,
        extra_macs=extra,
        macs=macs,
        budget=budget,
        dropped=tuple(a for a in ranked[limit:] if a not in always),
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


def single_plans(space: Space, most: int = 12) -> list[Plan]:
    """Single answers other than leaving a layer in float or taking channels away.

    First those for the whole network, then those for single places: of the most harmful slots the
    first answers, then their second answers together with the first of the next slots, and so on.
    """
    ranked = [
        (rank + i if space.nodes[_step(slot, rule)] else -1, rank, _step(slot, rule))
        for rank, (slot, rules) in enumerate(space.choices.items())
        for i, rule in enumerate(r for r in rules if r not in (KEEP, KEEP_FLOAT))
        if not saves(_step(slot, rule))
    ]
    plans = [space.repair([step]) for _, _, step in sorted(ranked, key=lambda r: r[:2])]
    return [plan for plan in plans if plan.steps][:most]


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
    # what costs damage is worth a thought where it saves MACs, which may be above the budget until then
    useful = {s for s, g in gain.items() if g > 0 or (g < 0 and space.extra_macs.get(s, 0) < 0)}
    saving = any(space.extra_macs.get(s, 0) < 0 for s in useful)
    inner = replace(space.budget, macs=None) if saving else space.budget
    for group in _groups(space, useful):
        more = np.array(
            [
                [
                    sum(space.extra_macs.get(s, 0) for s in steps),
                    sum(map(in_float, steps)),
                    -sum(gain[s] for s in steps),
                ]
                for steps in group
            ]
        )
        grown = (columns[:, None] + more).reshape(-1, 3)
        kept = _unbeaten(grown, inner)
        taken = [(*taken[i // len(group)], *group[i % len(group)]) for i in kept.tolist()]
        columns = grown[kept]
    most_macs = math.inf if space.budget.macs is None else space.budget.macs
    order = np.lexsort((columns[:, 2], columns[:, 0]))
    order = order[columns[order, 0] <= most_macs]
    lowest = np.minimum.accumulate(columns[order, 2])
    best = order[np.append(True, lowest[1:] < lowest[:-1])[: len(order)]]
    if len(best) > most:
        best = best[np.unique(np.linspace(0, len(best) - 1, most).round().astype(int))]
    return [(Plan(taken[i]), float(columns[i, 2])) for i in best.tolist()]


def _groups(space: Space, steps: set[Step]) -> Iterator[list[tuple[Step, ...]]]:
    """Valid combinations of steps of each set of anchors that exclude each other."""
    by_slot: dict[str, list[Step]] = {}
    for step in space.steps():
        if step in steps:
            by_slot.setdefault(slot_of(step), []).append(step)
    slots = list(by_slot)
    touched = {a: frozenset().union(*(space.nodes[s] for s in by_slot[a])) for a in slots}
    seen: set[str] = set()
    for slot in slots:
        if slot in seen:
            continue
        group, frontier = [], [slot]
        seen.add(slot)
        while frontier:
            here = frontier.pop()
            group.append(here)
            near = [a for a in slots if a not in seen and touched[a] & touched[here]]
            seen.update(near)
            frontier.extend(near)
        group.sort(key=slots.index)
        # A group too large to enumerate keeps its most harmful slots; the search covers the rest.
        while math.prod(1 + len(by_slot[a]) for a in group) > 4096:
            group.pop()
        combinations = itertools.product(*([None, *by_slot[a]] for a in group))
        picked = (tuple(s for s in values if s is not None) for values in combinations)
        yield [values for values in picked if _apart([space.nodes[s] for s in values])]


def _step(slot: str, rule: str) -> Step:
    return Step(rule, slot.partition("/")[0])


def _apart(needs: Sequence[frozenset[str]]) -> bool:
    return sum(map(len, needs)) == len(frozenset().union(*needs))


def _unbeaten(columns: Array, budget: Budget, most: int = 4000) -> NDArray[np.intp]:
    """Rows of (MACs, float layers, damage) in the budget that no other beats, at most `most`."""
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
