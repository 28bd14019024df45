from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn

from rewriter import Plan, Step
from rewriter.errors import QuantizeError
from rewriter.ladder import FITTED_DAMAGE, best, climb
from tests.rules import check

SHAPE = (3, 9, 8)
RANGES, SCALES, BIASES, ROUNDING = (
    f"{r}@model" for r in ("refine_ranges", "equalize", "correct_bias", "round_weights")
)


@dataclass(frozen=True)
class Score:
    damage: float | None
    metric: float | None = None
    latency_ratio: float | None = None


def graph(act: nn.Module | None = None) -> fx.GraphModule:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), act or nn.ReLU(), nn.Conv2d(6, 4, 1))
    return check.graph_of(check.randomise(net), SHAPE)


def formula(**factors: float) -> tuple[list[str], object]:
    """A score in which each step multiplies the damage, and the plans it was asked for."""
    asked: list[str] = []

    def score(plan: Plan) -> Score:
        asked.append(str(plan))
        damage = 1.0
        for step in plan.steps:
            damage *= factors.get(step.rule, 1.0)
        return Score(damage, 1 - damage)

    return asked, score


def test_each_remedy_stands_on_those_that_helped() -> None:
    asked, score = formula(refine_ranges=0.9, equalize=0.5, correct_bias=0.4, round_weights=0.3)
    rungs = climb(graph(), score)  # type: ignore[arg-type]
    assert [r.name for r in rungs] == [
        "plain int8",
        "better ranges",
        "equalization",
        "bias correction",
        "rounding",
        "without better ranges",
        "without equalization",
    ]
    assert asked == [
        str(Plan.parse(" ".join(p)))
        for p in (
            [],
            [RANGES],
            [RANGES, SCALES],
            [RANGES, SCALES, BIASES],
            [RANGES, SCALES, BIASES, ROUNDING],
            [SCALES, BIASES, ROUNDING],
            [RANGES, BIASES, ROUNDING],
        )
    ]
    assert [r.kept for r in rungs] == [True] * 5 + [False] * 2
    assert best(rungs) is rungs[4]
    assert rungs[4].damage < rungs[3].damage
    assert rungs[4].metric == 1 - rungs[4].damage


def test_what_helped_early_and_hurts_beside_the_others_is_dropped() -> None:
    def score(plan: Plan) -> Score:
        rules = {s.rule for s in plan.steps}
        rounding = 0.8 if "equalize" in rules else 0.3
        return Score(0.9 ** len(rules) * (rounding if "round_weights" in rules else 1.0))

    rungs = climb(graph(), score)
    assert best(rungs).name == "without equalization"
    assert str(best(rungs).plan) == str(Plan.parse(f"{RANGES} {BIASES} {ROUNDING}"))


def test_the_steps_of_the_base_are_never_dropped() -> None:
    def score(plan: Plan) -> Score:
        return Score(2.0 if "equalize" in str(plan) else 1.0)

    base = Plan.parse(SCALES)
    assert all("equalize" in str(r.plan) for r in climb(graph(), score, base))


def test_what_hurts_is_left_out_and_tried_once_more_at_the_end() -> None:
    asked, score = formula(refine_ranges=1.1, equalize=0.5, correct_bias=1.0, round_weights=0.3)
    rungs = climb(graph(), score)  # type: ignore[arg-type]
    assert [r.kept for r in rungs] == [True, False, True, False, True] + [False] * 3
    assert str(best(rungs).plan) == str(Plan.parse(f"{SCALES} {ROUNDING}"))
    assert rungs[-3].name == "better ranges, at last"
    assert rungs[-1].name == "without equalization"
    assert len(set(asked)) == len(asked) == 8


def test_a_remedy_that_helps_only_on_top_of_another_is_kept_at_last() -> None:
    def score(plan: Plan) -> Score:
        rules = {s.rule for s in plan.steps}
        ranges = 0.5 if "round_weights" in rules else 2.0
        return Score(ranges if "refine_ranges" in rules else 1.0 - 0.1 * len(rules))

    rungs = climb(graph(), score)
    assert best(rungs).name == "better ranges, at last"


def test_what_cannot_be_done_is_said_and_costs_nothing() -> None:
    asked, score = formula(refine_ranges=0.9)
    rungs = climb(graph(nn.SiLU()), score)  # type: ignore[arg-type]
    scaled = next(r for r in rungs if r.name == "equalization")
    assert "SiLU" in scaled.note
    assert not scaled.kept
    assert not any("equalize" in text for text in asked)


def test_a_failure_is_a_rung_that_is_not_kept() -> None:
    def score(plan: Plan) -> Score:
        if "equalize" in str(plan):
            raise QuantizeError("planted")
        return Score(None if "correct_bias" in str(plan) else 1.0 - 0.1 * len(plan.steps))

    rungs = climb(graph(), score)
    assert {r.name: r.note for r in rungs}["equalization"] == "planted"
    assert not any(r.kept for r in rungs if "bias" in r.name)
    assert "correct_bias" not in str(best(rungs).plan)


def test_all_rungs_have_the_steps_of_the_base() -> None:
    asked, score = formula(equalize=0.5)
    base = Plan.parse("keep_float@_0")
    climb(graph(), score, base)  # type: ignore[arg-type]
    assert asked
    assert all("keep_float@_0" in text for text in asked)
    assert torch.is_grad_enabled()


REPLACED = ("activations replaced", (Step("replace_activation_relu", "_0"),))


def test_what_is_fitted_is_tried_last_and_scaled_where_scaling_did_not_pass() -> None:
    asked, score = formula(refine_ranges=0.9, replace_activation_relu=0.5, equalize=0.4)
    rungs = climb(graph(nn.SiLU()), score, splits=[REPLACED])  # type: ignore[arg-type]
    assert [r.name for r in rungs[-2:]] == [
        "activations replaced",
        "activations replaced, equalized",
    ]
    assert all(r.kept for r in rungs[-2:])
    assert asked.index(str(Plan.parse(f"{RANGES} replace_activation_relu@_0"))) >= 4
    assert str(best(rungs).plan) == str(
        Plan.parse(f"{RANGES} {SCALES} replace_activation_relu@_0")
    )


def test_scaling_that_does_harm_there_is_not_kept() -> None:
    _, score = formula(replace_activation_relu=0.5, equalize=1.2)
    rungs = climb(graph(nn.SiLU()), score, splits=[REPLACED])  # type: ignore[arg-type]
    assert [r.kept for r in rungs[-2:]] == [True, False]


def test_where_little_damage_is_left_nothing_is_replaced() -> None:
    asked, score = formula(refine_ranges=FITTED_DAMAGE * 0.99, replace_activation_relu=0.5)
    climb(graph(nn.SiLU()), score, splits=[REPLACED])  # type: ignore[arg-type]
    assert not any("replace" in text for text in asked)


@pytest.mark.parametrize(("step", "kept"), [("scale_norm@n", True), ("split_range_2@_0", False)])
def test_steps_that_cost_no_kernels_need_no_large_gain(step: str, kept: bool) -> None:
    _, score = formula(scale_norm=0.95, split_range_2=0.95)
    steps = Plan.parse(step).steps
    rungs = climb(graph(), score, splits=[("some", steps)])  # type: ignore[arg-type]
    assert next(r for r in rungs if r.name == "some").kept is kept
