"""Which plans to score next, from what the analysis says and from what is scored.

A schedule is a list of named phases. Each is a function from the scores so far to the plans that it
wants scored, and wants none until that which it builds on is scored. They are carried out one after
the other. A new phase is a method of `Schedule` and a line in `Schedule.phases`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from rewriter import Plan, Step, find_sites
from rewriter.ladder import REMEDIES, Rung, Splits, exact_splits
from search.run_dir.scores import Score
from search.sensitivity.run import Sensitivity
from search.strategy.budgets import Savings
from search.strategy.damage_model import refitted
from search.strategy.ladder_replay import rungs, start
from search.strategy.space import (
    KEEP_FLOAT,
    Space,
    predicted_front,
    reference_plans,
    saves,
    single_plans,
)

# What to score next, given all scores so far by plan.
Worth = Callable[[Mapping[str, Score]], Sequence[Plan]]

MIN_LEFT = 0.02  # no step is trusted to take away more than 98 % of the damage
# A rule that left more than this times the damage, at each of so many places, is asked at no more
# places: those that were asked are the most harmful ones, where it has most to gain.
HARM, STRIKES = 1.5, 2
BETWEEN = 2  # single answers from one reference to the next
TOGETHER = 6  # single answers after which the best of those known are tried together
# Of a layer in float, of the damage that is left: less is within what a screening is wrong by.
MIN_FLOAT_GAIN = 0.02


Scores = Mapping[str, Score]
Phase = Callable[[Scores], Sequence[Plan]]


def worth_trying(gm: fx.GraphModule, space: Space, *rest: Any, **more: Any) -> Schedule:
    """What to score before TPE is asked, given the scores so far by plan text; arguments as for `Schedule`."""
    return Schedule(gm, space, *rest, **more)


@dataclass(frozen=True)
class Basis:
    """The plan that later phases build on, and what it leaves of the damage.

    Attributes:
        plan: Its steps are part of every plan of these phases.
        damage: Of this plan; above 0.
        empty: Damage of plain int8; above 0.
    """

    plan: Plan
    damage: float
    empty: float


@dataclass(frozen=True)
class Known:
    """What single answers on top of a basis have shown.

    Attributes:
        gain: By step, what it takes off the logarithm of the damage; 0 where nothing is known.
        measured: The steps whose gain was measured.
    """

    gain: Mapping[Step, float]
    measured: frozenset[Step]


@dataclass(frozen=True)
class Schedule:
    """The phases of a search before and beside TPE; call it with all scores so far.

    A step is taken to multiply the damage by the factor that it has alone: so the prediction never
    falls below zero, and the logarithm is additive. A layer in float that was not scored takes
    away the share of the damage that a screening of the best rung says.

    Attributes:
        gm: Profiled canonical graph.
        space: Choices and costs.
        sensitivity: Damage of each layer.
        trials: Plans that will be scored in all; a third of them are single answers.
        admits: Whether a plan can be carried out within the limits; others are left out.
        gains_on: The share of the damage of a plan that each layer in float takes away, by layer
            name; asked of the ladder's best rung, where other layers hurt than in plain int8. None:
            the shares of plain int8 stand for it.
        savings: Plans that cost less than the network as it is; None: none are wanted.
        most_time: Longest time of a rung's file, relative to plain int8; None: any.
    """

    gm: fx.GraphModule
    space: Space
    sensitivity: Sensitivity
    trials: int
    admits: Callable[[Plan], bool] = lambda plan: True
    gains_on: Callable[[Plan], Mapping[str, float]] | None = None
    savings: Savings | None = None
    most_time: float | None = None
    _shares: dict[Plan, dict[Step, float]] = field(
        default_factory=dict[Plan, dict[Step, float]], init=False, repr=False, compare=False
    )
    _ladders: dict[tuple[object, ...], tuple[Rung, ...] | Plan] = field(
        default_factory=dict[tuple[object, ...], "tuple[Rung, ...] | Plan"],
        init=False,
        repr=False,
        compare=False,
    )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """In the order in which they are carried out."""
        return (
            self.ladder,
            self.less_compute,
            self.layers_in_float,
            self.without_damage,
            self.single_answers,
            self.compute_neutral,
            self.predicted,
            self.corrected,
        )

    def __call__(self, scores: Scores) -> list[Plan]:
        """The plans of all phases up to the first that has one which is not scored, in order."""
        plans: list[Plan] = []
        for phase in self.phases:
            plans += phase(scores)
            if any(str(p) not in scores for p in plans):
                break
        return plans

    def ladder(self, scores: Scores) -> list[Plan]:
        """Plain int8 and the free remedies, one on top of the other; it may be all that a small budget reaches."""
        ladder = self._climbed(scores)
        if isinstance(ladder, Plan):
            plans = (*self._curve[:1], *self._below(scores), ladder)
            return list(dict.fromkeys(plans))
        return [*self._curve[:1], *(r.plan for r in ladder if not r.note)]

    def less_compute(self, scores: Scores) -> list[Plan]:
        """On the ladder's best rung, the best plan for each budget below the network as it is."""
        rung = self._rung(scores)
        plans: list[Plan] = []
        if self.savings is None or rung is None:
            return plans
        for lot in self.savings.phases(rung.plan, scores):
            plans += [plan for plan in lot if self.admits(plan)]
            if any(str(p) not in scores for p in plans):
                break
        return plans

    def compute_neutral(self, scores: Scores) -> list[Plan]:
        """Rewrites that cost MACs and have shown a gain, paid for by what is saved elsewhere."""
        basis = self._basis(scores)
        if self.savings is None or basis is None:
            return []
        if any(str(p) not in scores for p in self.single_answers(scores)):
            return []
        known = self._all_known(basis, scores)
        spend = [s for s in known.measured if self.space.extra_macs.get(s, 0) > 0]
        gains = {s: basis.damage * (1 - math.exp(-known.gain[s])) for s in spend}
        plans = self.savings.with_spending(basis.plan, scores, gains)
        return [plan for plan in plans if self.admits(plan)]

    def layers_in_float(self, scores: Scores) -> list[Plan]:
        """On the ladder's best rung, the layers in float that should gain most."""
        rung = self._rung(scores)
        return [] if rung is None else self._in_float(rung)

    def without_damage(self, scores: Scores) -> list[Plan]:
        """Where no damage is known, or none is left, nothing can be predicted: the references and the single answers."""
        if self._rung(scores) is not None:
            return []
        ladder = self._climbed(scores)
        if isinstance(ladder, Plan):
            return []
        return [*self._curve[1:], *self._on_top(start(ladder), self._singles)]

    def single_answers(self, scores: Scores) -> list[Plan]:
        """On top of both, single answers, a few at a time, and after each few the best of them together.

        Between them stand the references, a curve of layers in float to compare with.
        """
        basis = self._basis(scores)
        if basis is None:
            return []
        plans: list[Plan] = []
        references = iter(self._curve[1:])
        seen: list[Plan] = []
        for answers in self._rounds(basis, scores):
            plans += _interleaved(answers, references)
            if any(str(p) not in scores for p in plans):
                return plans
            seen += answers
            known = self._known(basis, seen, scores)
            plans += self._on_top(basis.plan, self._best_of(known.gain, basis.damage))
        return [*plans, *references]

    def predicted(self, scores: Scores) -> list[Plan]:
        """The front that the single answers predict."""
        basis = self._basis(scores)
        if basis is None or any(str(p) not in scores for p in self.single_answers(scores)):
            return []
        return self._front(basis, self._all_known(basis, scores).gain)

    def corrected(self, scores: Scores) -> list[Plan]:
        """Every other time, while TPE proposes the others: the front that all scores predict."""
        basis = self._basis(scores)
        if basis is None or len(scores) % 2:
            return []
        before = [*self.single_answers(scores), *self.predicted(scores)]
        if any(str(p) not in scores for p in before):
            return []
        known = self._all_known(basis, scores)
        gains = refitted(known.gain, known.measured, basis.plan, scores)
        return [*self._front(basis, gains.mean), *self._front(basis, gains.hoped())]

    @cached_property
    def _curve(self) -> list[Plan]:
        """Plain int8 and the most harmful layers in float, one more at a time."""
        return reference_plans([d.node for d in self.sensitivity.layers], self.space)

    @cached_property
    def _singles(self) -> list[Plan]:
        found = single_plans(self.space, max(6, self.trials // 3))
        return [p for p in found if not of_the_ladder(p)]

    @cached_property
    def _splits(self) -> Splits:
        return splits_of(self.gm, self.space, self.sensitivity)

    def _below(self, scores: Scores) -> list[Plan]:
        """The rungs that are scored already, in the order in which they were climbed."""
        known: dict[str, Score] = {}
        while isinstance(
            following := rungs(self.gm, known, self._splits, self.most_time), Plan
        ) and (str(following) in scores):
            known[str(following)] = scores[str(following)]
        return [Plan.parse(text) for text in known]

    def _climbed(self, scores: Scores) -> tuple[Rung, ...] | Plan:
        """The ladder as far as it is scored; every phase asks for that of the same scores."""
        key = tuple((s.plan, s.damage, s.metric) for s in scores.values())
        if key not in self._ladders:
            self._ladders.clear()
            self._ladders[key] = rungs(self.gm, scores, self._splits, self.most_time)
        return self._ladders[key]

    def _rung(self, scores: Scores) -> Basis | None:
        """The best rung of the ladder; None while it is not known, or where its damage is none or infinite."""
        ladder = self._climbed(scores)
        if isinstance(ladder, Plan):
            return None
        base = start(ladder)
        empty, bottom = scores[""].damage, scores[str(base)].damage
        return Basis(base, bottom, empty) if empty and bottom else None

    def _basis(self, scores: Scores) -> Basis | None:
        """The best rung, with those layers in float where that leaves less; None until both are scored."""
        rung = self._rung(scores)
        in_float = [] if rung is None else self._in_float(rung)
        if rung is None or any(str(p) not in scores for p in in_float):
            return None
        plan, damage = _least([rung.plan, *in_float], scores)
        return Basis(plan, damage, rung.empty)

    def _in_float(self, rung: Basis) -> list[Plan]:
        share = self._shares_of(rung)
        floats = {step: _gain(1 - s) for step, s in share.items() if s >= MIN_FLOAT_GAIN}
        return self._on_top(rung.plan, self._best_of(floats, rung.damage))

    def _shares_of(self, rung: Basis) -> dict[Step, float]:
        """Of the damage of a plan, what each layer in float takes away; asked once for each plan."""
        layers = self.sensitivity.layers
        if self.gains_on is None:
            return {Step(KEEP_FLOAT, d.node): d.damage / rung.empty for d in layers}
        if rung.plan not in self._shares:
            nodes = {d.layer: d.node for d in layers}
            found = self.gains_on(rung.plan)
            self._shares[rung.plan] = {
                Step(KEEP_FLOAT, nodes[name]): share
                for name, share in found.items()
                if name in nodes
            }
        return self._shares[rung.plan]

    def _rounds(self, basis: Basis, scores: Scores) -> list[list[Plan]]:
        """Single answers on top of a basis, a few at a time."""
        asked = [p for p in self._on_top(basis.plan, self._singles) if p != basis.plan]
        asked = _without_harmful(asked, basis.plan, HARM * basis.damage, scores)
        return [asked[at : at + TOGETHER] for at in range(0, len(asked), TOGETHER)]

    def _all_known(self, basis: Basis, scores: Scores) -> Known:
        answers = itertools.chain.from_iterable(self._rounds(basis, scores))
        return self._known(basis, list(answers), scores)

    def _known(self, basis: Basis, answers: Sequence[Plan], scores: Scores) -> Known:
        """What those of some answers have shown that are scored."""
        steps = [s for s in self.space.steps() if s not in basis.plan.steps and not saves(s)]
        gain = dict.fromkeys(steps, 0.0)
        measured: set[Step] = set()
        for step in steps:
            plan = self.space.repair([*basis.plan.steps, step])
            score = scores.get(str(plan))
            if plan in answers and score is not None and score.damage is not None:
                gain[step] = _gain(score.damage / basis.damage)
                measured.add(step)
        return Known(gain, frozenset(measured))

    def _best_of(self, gain: Mapping[Step, float], bottom: float) -> list[Plan]:
        """What is predicted to leave the least damage."""
        return [plan for plan, _ in predicted_front(self.space, gain, math.log(bottom))[-1:]]

    def _front(self, basis: Basis, gain: Mapping[Step, float]) -> list[Plan]:
        found = predicted_front(self.space, gain, math.log(basis.damage))
        return self._on_top(basis.plan, [plan for plan, _ in found])

    def _on_top(self, base: Plan, plans: Iterable[Plan]) -> list[Plan]:
        """Each plan together with the steps of the base, where that can be carried out."""
        both = dict.fromkeys(self.space.repair([*base.steps, *p.steps]) for p in plans)
        return [plan for plan in both if self.admits(plan)]


def _gain(left: float) -> float:
    """What a step takes off the logarithm of the damage, of which it leaves such a share."""
    return -math.log(max(left, MIN_LEFT))


def _least(plans: Sequence[Plan], scores: Mapping[str, Score]) -> tuple[Plan, float]:
    """The plan with the least damage of some, of which the first has one; and that damage."""
    known = [(damage, p) for p in plans if (damage := scores[str(p)].damage) is not None]
    damage, plan = min(known, key=lambda pair: pair[0])
    return plan, max(damage, 1e-12)  # of which there is a logarithm


def splits_of(gm: fx.GraphModule, space: Space, sensitivity: Sensitivity) -> Splits:
    """The rungs of the ladder that split layers, as far as they are in the space."""
    found = exact_splits(gm, find_sites(gm), sensitivity.damage_by_node())
    return [(name, space.repair(steps).steps) for name, steps in found]


def of_the_ladder(plan: Plan, more: tuple[str, ...] = ()) -> bool:
    """Whether a plan has only free remedies, or steps of ``more`` rules."""
    return all(step.rule in (*dict(REMEDIES).values(), *more) for step in plan.steps)


def _without_harmful(
    plans: Sequence[Plan], base: Plan, most: float, scores: Mapping[str, Score]
) -> list[Plan]:
    """Single answers on top of a base, less those of rules that did harm at every place so far."""
    strikes: dict[str, int] = {}
    helped: set[str] = set()
    kept: list[Plan] = []
    for plan in plans:
        rules = {s.rule for s in plan.steps if s not in base.steps}
        score = scores.get(str(plan))
        if score is None:
            if any(strikes.get(r, 0) >= STRIKES and r not in helped for r in rules):
                continue
        elif score.damage is None or score.damage > most:
            for rule in rules:
                strikes[rule] = strikes.get(rule, 0) + 1
        else:
            helped |= rules
        kept.append(plan)
    return kept


def _interleaved(plans: Sequence[Plan], others: Iterator[Plan]) -> list[Plan]:
    """Before every few plans the next of the others."""
    found: list[Plan] = []
    for i, plan in enumerate(plans):
        if i % BETWEEN == 0:
            found += itertools.islice(others, 1)
        found.append(plan)
    return found
