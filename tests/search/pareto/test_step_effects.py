"""What a step is worth, from pairs of scored plans."""

from __future__ import annotations

import pytest

from search.pareto.step_effects import effect_said, step_effects
from search.run_dir.scores import Score


def score(plan: str, damage: float, macs: int = 100, **more: object) -> Score:
    return Score(plan=plan, macs=macs, damage=damage, metric=1 - damage, **more)  # pyright: ignore[reportArgumentType]


def test_a_step_is_measured_by_the_largest_known_pair_inside_the_plan() -> None:
    scores = [score("", 0.5), score("a@x", 0.3), score("b@x", 0.4), score("a@x b@x", 0.1, 120)]
    a, b = step_effects("a@x b@x", scores)
    assert (a.step, a.macs, a.beside) == ("a@x", 20, 1)
    assert a.damage == pytest.approx(-0.3)
    assert a.metric == pytest.approx(0.3)
    assert (b.macs, b.damage) == (20, pytest.approx(-0.2))
    (alone,) = step_effects("b@x", scores)
    assert (alone.damage, alone.beside) == (pytest.approx(-0.1), 0)


def test_order_does_not_count_and_failed_or_stopped_plans_do_not_serve() -> None:
    scores = [
        score("b@x a@x", 0.1),
        score("a@x", 0.3, stopped=True),
        score("b@x", 0.4, error="no"),
        score("", 0.5),
    ]
    (both,) = step_effects("a@x b@x", scores)
    assert (both.step, both.damage, both.on) == ("a@x b@x", pytest.approx(-0.4), "together")


def test_steps_that_were_only_scored_together_are_one_group() -> None:
    known = [score("", 0.5), score("a@x b@x", 0.2), score("a@x b@x c@x", 0.1, 120)]
    both, last = step_effects("a@x b@x c@x", known)
    assert (both.step, both.damage, both.beside) == ("a@x b@x", pytest.approx(-0.3), 0)
    assert (last.step, last.on) == ("c@x", "on top of 2 other steps")
    more = [*known, score("a@x b@x c@x d@x e@x", 0.05)]
    groups = [(e.step, e.on) for e in step_effects("a@x b@x c@x d@x e@x", more)]
    assert groups == [
        ("a@x b@x", "together"),
        ("c@x", "on top of 2 other steps"),
        ("d@x e@x", "together, on top of 3 other steps"),
    ]
    # nothing is said of a plan without a scored part
    assert [e.beside for e in step_effects("c@x d@x", more)] == [None, None]


def test_said_in_one_line() -> None:
    scores = [score("", 0.5), score("a@x", 0.3, 1_000_100)]
    (effect,) = step_effects("a@x", scores)
    assert effect_said(effect, "top1") == (
        "a@x: +1.00 M MACs, damage -0.2, top1 +20.00 points (alone)"
    )
    (unknown,) = step_effects("c@x", scores)
    assert effect_said(unknown, "top1") == "c@x: not measured apart from the others"
