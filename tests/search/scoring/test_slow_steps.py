from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from rewriter import Plan, PlanError
from search.run_dir.scores import Score
from search.scoring import slow_steps
from search.scoring.slow_steps import slowest_step, too_slow, warn_of_slow_plan

PLAN = Plan.parse("equalize@model split_range_2@a split_range_3@b")


def score(plan: str, damage: float | None, ratio: float | None, **more: Any) -> Score:
    return Score(plan, macs=1, damage=damage, latency_ratio=ratio, **more)


@pytest.fixture
def evaluator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plain int8 takes 2 ms, and each split adds a number of its own; nothing can be done without equalize@model."""

    def price(gm: object, plan: Plan, *rest: object) -> Any:
        names = {str(s) for s in plan.steps}
        if "equalize@model" not in names:
            raise PlanError("needs it")
        added = {"split_range_2@a": 0.1, "split_range_3@b": 3.0}
        return SimpleNamespace(milliseconds=2.0 + sum(added.get(n, 0.0) for n in names))

    monkeypatch.setattr(slow_steps, "price_of_plan", price)
    return SimpleNamespace(
        table=object(), plain_ms=lambda: 2.0, calibration=[[0, 1]], gm=None, scheme=None
    )


def test_the_step_without_which_the_file_is_fastest(evaluator: Any) -> None:
    found = slowest_step(evaluator, PLAN)
    assert found is not None
    assert str(found[0]) == "split_range_3@b"
    assert found[1] == pytest.approx(1.05)
    evaluator.table = None
    assert slowest_step(evaluator, PLAN) is None


def test_only_a_plan_that_time_alone_keeps_off_is_named() -> None:
    best = score("", 1.0, 1.0)
    scores = [
        best,
        score("a@b", 0.5, 1.1),
        score("c@d", 0.4, 1.2),
        score("e@f", 0.2, 1.3, stopped=True),
        score("g@h", None, 1.4, error="failed"),
        score("i@j", 2.0, 1.5),
        score("k@l", 0.3, None),
    ]
    found = too_slow(scores, best, 1.1)
    assert found is not None
    assert found.plan == "c@d"
    assert too_slow(scores, best, None) is None
    assert too_slow(scores, score("", 0.4, 1.0), 1.1) is None


def test_the_warning_names_plan_step_and_times(
    evaluator: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scores = [score("", 1.0, 1.0), score(str(PLAN), 0.1, 2.55)]
    with caplog.at_level(logging.WARNING):
        warn_of_slow_plan(evaluator, scores, scores[0], 1.1)
    (record,) = caplog.records
    said = record.getMessage()
    assert "2.55 times" in said
    assert "split_range_3@b does it, 1.05 times without it" in said
    assert str(PLAN) in said
