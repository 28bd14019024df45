"""A rung that slows the file is not free: weighed, limited, tried in parts, and tried without at last."""

from __future__ import annotations

import pytest
from torch import fx, nn

from rewriter import Plan, Step
from rewriter.ladder import FREE_TIME, SPLIT_GAIN, TIME_PRICE, best, climb
from tests.rules import check
from tests.test_ladder import Score

SPLITS = (("channels split by range", (Step("split_range_3", "a"), Step("split_range_3", "b"))),)


def graph() -> fx.GraphModule:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    return check.graph_of(check.randomise(net), (3, 9, 8))


def formula(damage: dict[str, float], time: dict[str, float]):
    """Each step multiplies damage and time by numbers of its own; by ``rule@anchor`` or by rule."""

    def score(plan: Plan) -> Score:
        left, slower = 1.0, 1.0
        for step in plan.steps:
            left *= damage.get(str(step), damage.get(step.rule, 1.0))
            slower *= time.get(str(step), time.get(step.rule, 1.0))
        return Score(left, None, slower)

    return score


@pytest.mark.parametrize("slower", [1.0, FREE_TIME, FREE_TIME + 0.01, 1.08])
def test_slower_rungs_must_gain_more(slower: float) -> None:
    price = 1.0 if slower <= FREE_TIME else slower**-TIME_PRICE
    for left, kept in ((0.99 * price, True), (1.01 * price, False)):
        score = formula({"equalize": left}, {"equalize": slower})
        rungs = climb(graph(), score, max_latency_ratio=1.1)
        assert next(r for r in rungs if r.name == "equalization").kept is kept, (left, slower)


def test_a_rung_beyond_the_limit_is_not_kept_whatever_it_gains() -> None:
    score = formula({"equalize": 1e-6, "correct_bias": 0.5}, {"equalize": 1.2})
    plan = str(best(climb(graph(), score, max_latency_ratio=1.1)).plan)
    assert "equalize" not in plan
    assert "correct_bias" in plan
    assert "equalize" in str(best(climb(graph(), score)).plan)


def test_a_time_that_is_not_known_says_nothing() -> None:
    def score(plan: Plan) -> Score:
        return Score(0.5 ** len(plan.steps))

    assert all(r.kept for r in climb(graph(), score, max_latency_ratio=1.1)[:5])


def test_splits_that_are_too_slow_together_are_tried_alone() -> None:
    score = formula(
        {"split_range_3@a": 0.1, "split_range_3@b": 0.5},
        {"split_range_3@a": 1.02, "split_range_3@b": 1.5},
    )
    rungs = climb(graph(), score, splits=SPLITS, max_latency_ratio=1.1)
    assert [r.name for r in rungs if "alone" in r.name] == [
        "channels split by range, a alone",
        "channels split by range, b alone",
    ]
    assert "split_range_3@a" in str(best(rungs).plan)
    assert "split_range_3@b" not in str(best(rungs).plan)


@pytest.mark.parametrize("needed", [True, False])
def test_a_split_that_a_later_remedy_makes_superfluous_is_taken_back(needed: bool) -> None:
    def score(plan: Plan) -> Score:
        rules = {s.rule for s in plan.steps}
        ratio = 1.05 if "split_range_3" in rules else 1.0
        split = 0.5 if "split_range_3" in rules else 1.0
        if "equalize" in rules:
            return Score((1 if not needed else split) * 0.1, None, ratio)
        return Score(split, None, ratio)

    rungs = climb(graph(), score, splits=SPLITS, max_latency_ratio=1.1)
    assert rungs[1].kept
    assert rungs[-1].name == "without channels split by range"
    assert ("split_range_3" in str(best(rungs).plan)) is needed


def test_a_split_that_costs_no_time_needs_no_second_look() -> None:
    score = formula({"split_range_3": 0.9 - SPLIT_GAIN}, {})
    rungs = climb(graph(), score, splits=SPLITS)
    assert not [r for r in rungs if r.name.startswith("without channels")]
