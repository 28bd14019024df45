"""What the plans that cost less are compared with."""

from __future__ import annotations

import pytest

from rewriter.plan import Plan
from search.pareto.controls import controls, has_one_knob
from search.run_dir.scores import Score

EVERYWHERE = "correct_bias@model " + " ".join(f"thin_channels_88@c{i}" for i in range(5))
SOME = "correct_bias@model " + " ".join(f"thin_channels_88@c{i}" for i in range(3))
SMALLER = "correct_bias@model lower_resolution_86@x"


def score(plan: str, ratio: float, *, stopped: bool = False) -> Score:
    return Score(plan, round(1000 * ratio), macs_ratio=ratio, damage=0.1, stopped=stopped)


def test_the_same_amount_everywhere_and_smaller_images_are_the_control() -> None:
    mixed = f"{SOME} thin_channels_50@c3"
    scores = [score(EVERYWHERE, 0.8), score(SOME, 0.9), score(SMALLER, 0.75), score(mixed, 0.7)]
    found = [(c["plan"], c["how"]) for c in controls(scores)]
    assert found == [(SMALLER, "lower resolution"), (EVERYWHERE, "uniform thinning")]


def test_some_places_are_no_control_because_all_of_them_were_given_up() -> None:
    assert controls([score(EVERYWHERE, 0.8, stopped=True), score(SOME, 0.9)]) == []


@pytest.mark.parametrize(
    ("plan", "one"),
    [
        (SMALLER, True),
        (EVERYWHERE, True),
        ("correct_bias@model", False),
        ("thin_channels_88@a thin_channels_88@b", False),
        (f"{SMALLER} thin_channels_88@a", False),
    ],
)
def test_plans_with_one_knob(plan: str, one: bool) -> None:
    assert has_one_knob(Plan.parse(plan)) is one
