from __future__ import annotations

import itertools
import random

import pytest

from rewriter.fitting import Price
from rewriter.plan import Plan, Step
from search.run_dir.scores import Score
from search.strategy.budgets import (
    STEP,
    Savings,
    between,
    corrected,
    plans_for,
    ratios,
    uniform_plans,
)
from search.strategy.space import KEEP, Budget, Space

AMOUNTS = ("thin_channels_75", "thin_channels_50")
MACS = 1000
BASE = Plan.parse("correct_bias@model")


def space(places: int = 4, most: float = 1.15, least: float = 0.6) -> Space:
    """Places where channels can go, one rewrite that spends, a smaller input, and a free remedy."""
    draw = random.Random(places)
    choices: dict[str, tuple[str, ...]] = {"model/correct_bias": (KEEP, "correct_bias")}
    nodes: dict[Step, frozenset[str]] = {Step("correct_bias", "model"): frozenset()}
    extra: dict[Step, int] = {Step("correct_bias", "model"): 0}
    choices["d"] = (KEEP, "merge_separable")
    nodes[Step("merge_separable", "d")] = frozenset({"replace:d"})
    extra[Step("merge_separable", "d")] = 80
    for i in range(places):
        choices[f"c{i}/thin"] = (KEEP, *AMOUNTS)
        saved = draw.randint(60, 120)
        for rule, share in zip(AMOUNTS, (1, 2), strict=True):
            step = Step(rule, f"c{i}")
            nodes[step] = frozenset({f"thin:c{i}"})
            extra[step] = -saved * share // 2
    choices["x/resize"] = (KEEP, "lower_resolution_86")
    nodes[Step("lower_resolution_86", "x")] = frozenset({"resize:x"})
    extra[Step("lower_resolution_86", "x")] = -200
    return Space(choices, nodes, extra, MACS, Budget(most * MACS, None, least * MACS))


def prices(s: Space) -> dict[Step, Price]:
    draw = random.Random(3)
    return {
        step: Price(-s.extra_macs[step], draw.uniform(0.001, 0.1))
        for step in s.steps()
        if step.rule in AMOUNTS
    }


@pytest.mark.parametrize("places", [2, 4, 5])
def test_each_budgets_plan_is_the_best_of_all(places: int) -> None:
    s = space(places)
    cost = {step: p.damage for step, p in prices(s).items()}
    cost[Step("merge_separable", "d")] = -0.05
    options = [
        [None, *(st for st in s.steps() if st.anchor == a)]
        for a in ["d", *(f"c{i}" for i in range(places))]
    ]
    every = [tuple(x for x in combo if x) for combo in itertools.product(*options)]
    for budget in (1.0, 0.95, 0.9, 0.85):
        found = plans_for(s, BASE, cost, [budget])
        fitting = [
            sum(cost[x] for x in combo)
            for combo in every
            if MACS + sum(s.extra_macs[x] for x in combo) <= budget * MACS
        ]
        (plan,) = found
        assert set(BASE.steps) <= set(plan.steps)
        assert s.predicted_macs(plan) <= budget * MACS
        assert sum(cost.get(x, 0.0) for x in plan.steps) == pytest.approx(min(fitting))


def test_the_budgets_of_a_range() -> None:
    assert ratios(0.7, 1.15) == [0.95, 0.9, 0.85, 0.8, 0.75, 0.7]
    assert ratios(0.6, 1.15)[-2:] == [0.65, 0.6]
    assert ratios(0.72, 0.8) == [0.8, 0.75, 0.72]
    assert between([0.95, 0.9]) == [0.975, 0.925]


def test_a_rewrite_that_spends_is_paid_for_where_its_gain_was_measured() -> None:
    s = space(5)
    savings = Savings(s, 0.7, 1.15, lambda: prices(s))
    scores = {str(BASE): Score(str(BASE), macs=MACS, damage=0.2)}
    merge = Step("merge_separable", "d")
    assert savings.with_spending(BASE, scores, {merge: -0.01}) == []
    plans = savings.with_spending(BASE, scores, {merge: 0.15})
    neutral = [p for p in plans if merge in p.steps and s.predicted_macs(p) <= MACS]
    assert neutral
    assert max(s.predicted_macs(p) for p in plans) <= 1.1 * MACS


def test_lots_follow_each_other_and_mix_resolution_in_where_that_is_predicted_better() -> None:
    s = space(5)
    savings = Savings(s, 0.7, 1.15, lambda: prices(s))
    scores = {str(BASE): Score(str(BASE), macs=MACS, damage=0.01)}
    lots = savings.phases(BASE, scores)
    for plan in next(lots):
        damage = 0.01 + sum(2 * prices(s)[x].damage for x in plan.steps if x not in BASE.steps)
        scores[str(plan)] = Score(str(plan), macs=s.predicted_macs(plan), damage=damage)
    control = next(lots)
    assert {x.rule for p in control for x in p.steps} == {
        "correct_bias",
        *AMOUNTS,
        "lower_resolution_86",
    }
    for plan in control:
        scores[str(plan)] = Score(str(plan), macs=s.predicted_macs(plan), damage=0.011)
    later = [p for lot in lots for p in lot]
    mixed = [p for p in later if {x.rule for x in p.steps} & {"lower_resolution_86"}]
    assert mixed
    for plan in mixed:  # its saving is a share of what the others leave
        thin = sum(s.extra_macs[x] for x in plan.steps if x.rule in AMOUNTS)
        assert s.predicted_macs(plan) == round((MACS + thin) * 0.8)
    assert later == [p for lot in list(savings.phases(BASE, scores))[2:] for p in lot]


def test_the_table_is_corrected_by_what_came_out() -> None:
    s = space(4)
    table = {step: p.damage for step, p in prices(s).items()}
    truth = {step: 0.5 * c for step, c in table.items()}
    worst = max(table, key=table.__getitem__)
    truth[worst] = 3 * table[worst]
    scores = {str(BASE): Score(str(BASE), macs=MACS, damage=0.01)}
    for combo in itertools.combinations(table, 2):
        if combo[0].anchor != combo[1].anchor:
            plan = Plan((*BASE.steps, *combo))
            damage = 0.01 + sum(truth[x] for x in combo)
            scores[str(plan)] = Score(str(plan), macs=MACS, damage=damage)
    found = corrected(table, BASE, scores)
    before = sum(abs(table[x] - truth[x]) / truth[x] for x in table)
    after = sum(abs(found[x] - truth[x]) / truth[x] for x in table)
    assert after < before / 3
    assert corrected(table, BASE, {}) == table


def test_a_step_that_saves_pays_for_one_above_the_limit() -> None:
    s = space(4, most=0.95)
    steps = [Step("merge_separable", "d"), *(Step(AMOUNTS[1], f"c{i}") for i in range(4))]
    plan = s.repair(steps)
    assert steps[0] in plan.steps
    assert s.repair(steps[:1]).steps == ()
    low = space(4, least=0.9)
    assert low.predicted_macs(low.repair(steps[1:])) >= 0.9 * MACS


@pytest.mark.parametrize("lowest", [0.75, 0.7, 0.65])
def test_the_plan_for_the_lowest_budget_is_not_cut_short(lowest: float) -> None:
    s = space(5, least=lowest - STEP)
    cost = {step: p.damage for step, p in prices(s).items()}
    (plan,) = plans_for(s, BASE, cost, [lowest])
    assert (lowest - STEP) * MACS <= s.predicted_macs(plan) <= lowest * MACS


def test_uniform_plans_take_the_same_everywhere() -> None:
    plans = uniform_plans(space(3), BASE)
    assert [{x.rule for x in p.steps} - {"correct_bias"} for p in plans] == [
        {AMOUNTS[0]},
        {AMOUNTS[1]},
    ]
