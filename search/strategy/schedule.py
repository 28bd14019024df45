"""Which plans to score next, from what the analysis says and from what is scored.

In this order: the ladder of free remedies (it may be all that a small budget reaches); on top of
its best rung, where less compute is wanted, the best plan for each budget; the layers in float that
should gain most; on top of both single answers, a few at a time, and after each few the best of
them together; between them the references, a curve of layers in float to compare with; the front
that all these predict; and from then on, every other time, what is predicted anew, while TPE
proposes the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import fx

from rewriter import Plan, Step, find_sites
from rewriter.ladder import REMEDIES, Splits, exact_splits
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

LEAST_LEFT = 0.02  # no step is trusted to take away more than 98 % of the damage
# A rule that left more than this times the damage, at each of so many places, is asked at no more
# places: those that were asked are the most harmful ones, where it has most to gain.
HARM, STRIKES = 1.5, 2
BETWEEN = 2  # single answers from one reference to the next
TOGETHER = 6  # single answers after which the best of those known are tried together
# Of a layer in float, of the damage that is left: less is within what a screening is wrong by.
LEAST_SHARE = 0.02


def worth_trying(
    gm: fx.GraphModule,
    space: Space,
    sensitivity: Sensitivity,
    trials: int,
    admits: Callable[[Plan], bool] = lambda plan: True,
    gains_on: Callable[[Plan], Mapping[str, float]] | None = None,
    savings: Savings | None = None,
) -> Worth:
    """What to score before TPE is asked, given the scores so far by plan text.

    A step is taken to multiply the damage by the factor that it has alone: so the prediction never
    falls below zero, and the logarithm is additive. A layer in float that was not scored takes
    away the share of the damage that a screening of the best rung says.

    Args:
        gm: Profiled canonical graph.
        space: Choices and costs.
        sensitivity: Damage of each layer.
        trials: Plans that will be scored in all; a third of them are single answers.
        admits: Whether a plan can be carried out within the limits; others are left out.
        gains_on: The share of the damage of a plan that each layer in float takes away, by layer
            name; asked of the ladder's best rung, where other layers hurt than in plain int8. None:
            the shares of plain int8 stand for it.
        savings: Plans that cost less than the network as it is; None: none are wanted.
    """
    first = reference_plans([d.node for d in sensitivity.layers], space)
    singles = [p for p in single_plans(space, max(6, trials // 3)) if not of_the_ladder(p)]
    alone = {Step(KEEP_FLOAT, d.node): d.damage for d in sensitivity.layers}
    splits = splits_of(gm, space, sensitivity)
    nodes = {d.layer: d.node for d in sensitivity.layers}
    asked_of: dict[Plan, dict[Step, float]] = {}

    def shares(base: Plan, empty: float) -> dict[Step, float]:
        """Of the damage of a plan, by layer in float."""
        if gains_on is None:
            return {step: damage / empty for step, damage in alone.items()}
        if base not in asked_of:
            found = gains_on(base)
            asked_of[base] = {
                Step(KEEP_FLOAT, nodes[name]): share
                for name, share in found.items()
                if name in nodes
            }
        return asked_of[base]

    def best_of(gain: Mapping[Step, float], bottom: float) -> list[Plan]:
        """What is predicted to leave the least damage."""
        return [plan for plan, _ in predicted_front(space, gain, math.log(bottom))[-1:]]

    def on_top(base: Plan, plans: Iterable[Plan]) -> list[Plan]:
        """Each plan together with the steps of the base, where that can be carried out."""
        both = dict.fromkeys(space.repair([*base.steps, *p.steps]) for p in plans)
        return [plan for plan in both if admits(plan)]

    def worth(scores: Mapping[str, Score]) -> list[Plan]:
        ladder = rungs(gm, scores, splits)
        if isinstance(ladder, Plan):
            return list(dict.fromkeys([*first[:1], *_below(gm, scores, splits), ladder]))
        base = start(ladder)
        plans = [*first[:1], *(r.plan for r in ladder if not r.note)]
        if any(str(p) not in scores for p in plans):
            return plans
        empty, bottom = scores[""].damage, scores[str(base)].damage
        if not empty or not bottom:
            return [*plans, *first[1:], *on_top(base, singles)]

        if savings is not None:
            for lot in savings.phases(base, scores):
                plans += [plan for plan in lot if admits(plan)]
                if any(str(p) not in scores for p in plans):
                    return plans

        share = shares(base, empty)
        floats = {step: _gain(1 - s) for step, s in share.items() if s >= LEAST_SHARE}
        plans += on_top(base, best_of(floats, bottom))
        if any(str(p) not in scores for p in plans):
            return plans
        base, bottom = _least([base, *plans[-1:]], scores)

        steps = [s for s in space.steps() if s not in base.steps and not saves(s)]
        gain = dict.fromkeys(steps, 0.0)
        measured: set[Step] = set()
        asked = [p for p in on_top(base, singles) if p != base]
        asked = _without_harmful(asked, base, HARM * bottom, scores)
        references = iter(first[1:])
        for at in range(0, len(asked), TOGETHER):
            answers = asked[at : at + TOGETHER]
            plans += _interleaved(answers, references)
            if any(str(p) not in scores for p in plans):
                return plans
            for step in steps:
                plan = space.repair([*base.steps, step])
                if plan in answers and (damage := scores[str(plan)].damage) is not None:
                    gain[step] = _gain(damage / bottom)
                    measured.add(step)
            plans += on_top(base, best_of(gain, bottom))
        if savings is not None:
            spent = {s: bottom * (1 - math.exp(-gain[s])) for s in measured if _spends(space, s)}
            plans += [p for p in savings.with_spending(base, scores, spent) if admits(p)]
        plans += references
        if any(str(p) not in scores for p in plans):
            return plans

        total = math.log(bottom)
        plans += on_top(base, [p for p, _ in predicted_front(space, gain, total)])
        if len(scores) % 2 == 0 and all(str(p) in scores for p in plans):
            gains = refitted(gain, frozenset(measured), base, scores)
            for belief in (gains.mean, gains.hoped()):
                found = predicted_front(space, belief, total)
                plans += on_top(base, [plan for plan, _ in found])
        return plans

    return worth


def _spends(space: Space, step: Step) -> bool:
    return space.extra_macs.get(step, 0) > 0


def _gain(left: float) -> float:
    """What a step takes off the logarithm of the damage, of which it leaves such a share."""
    return -math.log(max(left, LEAST_LEFT))


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


def _below(gm: fx.GraphModule, scores: Mapping[str, Score], splits: Splits) -> list[Plan]:
    """The rungs that are scored already, in the order in which they were climbed."""
    known: list[Plan] = []
    while isinstance(
        following := rungs(gm, {str(p): scores[str(p)] for p in known}, splits), Plan
    ):
        if str(following) not in scores:
            break
        known.append(following)
    return known


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
