from __future__ import annotations

import itertools

import numpy as np
import pytest

from rewriter.plan import Plan, Step
from rewriter.rules import Site
from search.strategy.space import (
    KEEP,
    Budget,
    make_space,
    predicted_front,
    reference_plans,
    single_plans,
)
from tests.search import fake


def test_anchors_are_ranked_by_harm_and_blocked_sites_are_left_out() -> None:
    space = fake.space()
    assert list(space.choices) == ["dw0", "dw1", "stem", "dw2", "pw0", "pw1", "head"]
    assert space.choices["dw0"] == (KEEP, "keep_float", "merge_separable")
    assert space.choices["dw2"] == (KEEP, "keep_float")
    assert space.product == 3**4 * 2**3


def test_a_large_space_keeps_the_most_harmful_anchors_and_names_the_others() -> None:
    space = fake.space(limit=3)
    assert list(space.choices) == ["dw0", "dw1", "stem"]
    assert space.dropped == ("dw2", "pw0", "pw1", "head")


def test_anchors_that_are_always_wanted_stay_in_a_large_space() -> None:
    space = make_space(
        fake.sites(), fake.DAMAGE, fake.price, fake.MACS, limit=2, always=["pw0", "dw0"]
    )
    assert list(space.choices) == ["dw0", "dw1", "pw0"]
    assert "pw0" not in space.dropped


def test_what_reads_a_value_counts_as_harm_of_what_makes_it() -> None:
    sites = [Site("keep_float", ("a",)), Site("split_range_2", ("b",), readers=("c",))]
    space = make_space(sites, {"a": 1.0, "b": 0.1, "c": 2.0}, fake.price, fake.MACS)
    assert list(space.choices) == ["b/split", "a"]


WHOLE = [Site("equalize", ("model",)), Site("correct_bias", ("model",))]


def test_rules_for_the_whole_network_come_first_and_go_together() -> None:
    space = make_space([*fake.sites(), *WHOLE], fake.DAMAGE, fake.price, fake.MACS, limit=2)
    assert list(space.choices) == ["model/equalize", "model/correct_bias", "dw0"]
    plan = space.plan({"model/equalize": "equalize", "model/correct_bias": "correct_bias"})
    assert str(plan) == "correct_bias@model equalize@model"
    assert space.plan(space.choice(plan) or {}) == plan
    assert [str(p) for p in single_plans(space, most=2)] == [
        "equalize@model",
        "correct_bias@model",
    ]
    gain = {Step("equalize", "model"): 0.2, Step("correct_bias", "model"): 0.1}
    assert [str(p) for p, _ in predicted_front(space, gain, 0.4)] == [str(plan)]


def test_rules_of_two_stages_may_act_on_one_layer() -> None:
    sites = [Site("replace_block", ("a", "b")), Site("split_range_2", ("a",))]
    space = make_space(sites, {"a": 1.0}, fake.price, fake.MACS)
    assert list(space.choices) == ["a", "a/split"]
    assert len(space.all_plans(10) or []) == 4


def test_a_step_that_turns_out_not_to_apply_is_left_out() -> None:
    space = make_space(fake.sites(), fake.DAMAGE, lambda step: None, fake.MACS)
    assert space.choices == {}
    assert space.all_plans(10) == [Plan(())]


def test_overlapping_answers_give_one_valid_plan_whatever_their_order() -> None:
    space = fake.space()
    choice = {"pw0": "keep_float", "dw0": "merge_separable", "stem": "replace_block"}
    assert str(space.plan(choice)) == "merge_separable@dw0 replace_block@stem"
    for order in itertools.permutations(choice.items()):
        assert space.plan(dict(order)) == space.plan(choice)


def test_every_choice_gives_a_plan_without_overlap_within_the_budget() -> None:
    budget = Budget(macs=1.1 * fake.MACS, float_layers=2)
    space = fake.space(budget)
    plans = space.all_plans(20_000)
    assert plans is not None
    assert len(plans) == len(set(plans))
    for plan in plans:
        used = list(itertools.chain.from_iterable(space.nodes[s] for s in plan.steps))
        assert len(used) == len(set(used))
        assert space.predicted_macs(plan) <= 1.1 * fake.MACS
        assert sum(s.rule == "keep_float" for s in plan.steps) <= 2
        assert space.plan(space.choice(plan) or {}) == plan


def test_a_step_over_the_budget_is_not_in_the_space() -> None:
    assert fake.space(Budget(macs=1.1 * fake.MACS)).choices["dw1"] == (KEEP, "keep_float")
    assert fake.space(Budget(float_layers=0)).choices["dw0"] == (KEEP, "merge_separable")


def test_a_plan_that_is_not_in_the_space_has_no_choice() -> None:
    assert fake.space().choice(Plan.parse("keep_float@nowhere")) is None
    assert fake.space(limit=1).all_plans(2) is None


def test_references_are_the_empty_plan_and_more_and_more_float_layers() -> None:
    ranked = sorted(fake.DAMAGE, key=lambda n: -fake.DAMAGE[n])
    plans = [str(p) for p in reference_plans(ranked, fake.space(Budget(float_layers=1)))]
    assert plans[:3] == ["", "keep_float@dw0", "keep_float@dw0 keep_float@dw1"]
    assert [p.count("@") for p in plans] == [0, 1, 2, 3, 5]


def test_single_plans_are_all_other_answers_of_the_top_anchors() -> None:
    assert [str(p) for p in single_plans(fake.space(), most=3)] == [
        "merge_separable@dw0",
        "merge_separable@dw1",
        "replace_block@stem",
    ]


@pytest.mark.parametrize(
    "budget",
    [Budget(), Budget(1.1 * fake.MACS, 2), Budget(float_layers=1), Budget(float_layers=0)],
)
@pytest.mark.parametrize("seed", range(5))
def test_the_predicted_front_is_exact_under_the_additive_model(budget: Budget, seed: int) -> None:
    space = fake.space(budget)
    random = np.random.default_rng(seed)
    gain = {s: float(random.normal(0.05, 0.05)) for s in space.steps()}
    found = predicted_front(space, gain, 1.0, most=1000)
    plans = space.all_plans(20_000)
    assert plans is not None
    points = {
        (space.predicted_macs(p), round(1.0 - sum(gain[s] for s in p.steps), 9)) for p in plans
    }
    best = {p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)}
    assert {(space.predicted_macs(p), round(d, 9)) for p, d in found} == best


def test_the_predicted_front_is_thinned_but_keeps_its_ends() -> None:
    space = fake.space(Budget(float_layers=0))
    whole = predicted_front(space, fake.GAIN, fake.TOTAL, most=100)
    few = predicted_front(space, fake.GAIN, fake.TOTAL, most=2)
    assert [few[0], few[-1]] == [whole[0], whole[-1]]


@pytest.mark.slow
def test_a_space_of_hundreds_of_anchors_is_solved_at_once() -> None:
    random = np.random.default_rng(0)
    names = [f"n{i}" for i in range(200)]
    sites = [Site(rule, (n,)) for n in names for rule in ("keep_float", "merge_separable")]
    extra = {Step("merge_separable", n): int(random.integers(1, 10**6)) for n in names}
    space = make_space(
        sites,
        dict.fromkeys(names, 1.0),
        lambda s: extra.get(s, 0),
        10**8,
        Budget(1.1 * 10**8, 4),
        limit=200,
    )
    gain = {s: float(random.random()) for s in space.steps()}
    front = predicted_front(space, gain, 100.0)
    assert front[0][1] > front[-1][1]
    assert all(space.plan(space.choice(p) or {}) == p for p, _ in front)


@pytest.mark.parametrize(("harm", "kept"), [(0.005, False), (0.02, True)])
def test_in_a_large_space_an_anchor_needs_a_hundredth_of_the_worst_harm(
    harm: float, kept: bool
) -> None:
    sites = [Site("keep_float", (name,)) for name in "abcd"]
    damage = {"a": 1.0, "b": 0.5, "c": harm, "d": 0.0}
    space = make_space(sites, damage, fake.price, fake.MACS, limit=3)
    assert list(space.choices) == (["a", "b", "c"] if kept else ["a", "b"])


def test_a_gate_in_float_counts_with_its_layers() -> None:
    sites = [Site("float_gate", ("down", "up")), Site("keep_float", ("stem",))]
    damage = {"down": 2.0, "up": 1.0, "stem": 1.0}
    for limit, wanted in (
        (0, []),
        (1, ["keep_float"]),
        (2, ["float_gate"]),
        (3, ["float_gate", "keep_float"]),
    ):
        space = make_space(sites, damage, lambda step: 0, 100, Budget(float_layers=limit))
        plan = space.repair([Step("float_gate", "down"), Step("keep_float", "stem")])
        assert [s.rule for s in plan.steps] == wanted
