"""The phases of a schedule, one by one, on a space of formulas and a ladder of two rungs."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rewriter.ladder import Rung
from rewriter.plan import Plan, Step
from rewriter.rules import Site
from search.run_dir.scores import Score
from search.strategy import schedule as module
from search.strategy.schedule import Schedule
from search.strategy.space import Budget, make_space
from tests.search import fake

RUNG = Plan((Step("fuse_expand", "head"),))
IN_FLOAT = Plan((*RUNG.steps, Step("keep_float", "dw0")))
# what each step leaves of the damage
LEFT = {
    Step("fuse_expand", "head"): 0.8,
    Step("keep_float", "dw0"): 0.5,
    Step("merge_separable", "dw1"): 0.6,
    Step("replace_block", "stem"): 1.2,
}


@pytest.fixture(autouse=True)
def ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain int8, then one rung on top of it, which helps."""

    def rungs(
        gm: object, scores: Any, splits: object, most: object = None
    ) -> tuple[Rung, ...] | Plan:
        for plan in (Plan(), RUNG):
            if str(plan) not in scores:
                return plan
        damage = [scores[str(p)].damage for p in (Plan(), RUNG)]
        names = ("plain int8", "fused")
        pairs = zip(names, (Plan(), RUNG), damage, strict=True)
        return tuple(Rung(n, p, d, None, kept=True) for n, p, d in pairs)

    monkeypatch.setattr(module, "find_sites", lambda gm: [])
    monkeypatch.setattr(module, "exact_splits", lambda gm, sites, damage: [])
    monkeypatch.setattr(module, "rungs", rungs)


def schedule(float_layers: int = 1, trials: int = 30, **more: Any) -> Schedule:
    space = fake.space(Budget(macs=1.3 * fake.MACS, float_layers=float_layers))
    layers = [SimpleNamespace(node=n, layer=f"net.{n}", damage=d) for n, d in fake.DAMAGE.items()]
    ranked: Any = SimpleNamespace(layers=layers, damage_by_node=lambda: fake.DAMAGE)
    nothing: Any = None
    return module.worth_trying(nothing, space, ranked, trials, **more)


def scored(*plans: Plan, damage: float | None = None) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for plan in plans:
        left = fake.TOTAL * math.prod(LEFT.get(s, 1.0) for s in plan.steps)
        macs = fake.MACS + sum(fake.EXTRA_MACS.get(s, 0) for s in plan.steps)
        value = left if damage is None else damage
        found[str(plan)] = Score(plan=str(plan), macs=macs, damage=value)
    return found


def carried_out(found: Schedule, turns: int) -> dict[str, Score]:
    """The scores after so many turns of a search that TPE never helps."""
    scores: dict[str, Score] = {}
    for _ in range(turns):
        following = [p for p in found(scores) if str(p) not in scores][:1]
        scores |= scored(*following)
    return scores


def test_the_phases_have_the_names_that_the_document_gives() -> None:
    names = [phase.__name__ for phase in schedule().phases]  # type: ignore[attr-defined]
    assert names == [
        "ladder",
        "less_compute",
        "layers_in_float",
        "without_damage",
        "single_answers",
        "compute_neutral",
        "predicted",
        "corrected",
    ]


def test_each_phase_waits_for_what_it_builds_on() -> None:
    found = schedule()
    for phase in found.phases[1:]:
        assert list(phase({})) == []
    after_ladder = scored(Plan(), RUNG)
    assert found.layers_in_float(after_ladder) == [IN_FLOAT]
    for phase in found.phases[1:]:
        if phase != found.layers_in_float:
            assert list(phase(after_ladder)) == []


def test_the_ladder_climbs_one_rung_at_a_time() -> None:
    found = schedule()
    assert found.ladder({}) == [Plan()]
    assert found.ladder(scored(Plan())) == [Plan(), RUNG]
    assert list(dict.fromkeys(found.ladder(scored(Plan(), RUNG)))) == [Plan(), RUNG]


def test_layers_in_float_are_those_of_the_screening_and_it_is_asked_once() -> None:
    asked: list[Plan] = []

    def gains_on(plan: Plan) -> dict[str, float]:
        asked.append(plan)
        return {"net.dw1": 0.7, "net.dw0": 0.1, "net.stem": 0.019}

    found = schedule(float_layers=2, gains_on=gains_on)
    scores = scored(Plan(), RUNG)
    for _ in range(2):
        (plan,) = found.layers_in_float(scores)
        assert {s.anchor for s in plan.steps if s.rule == "keep_float"} == {"dw1", "dw0"}
    assert asked == [RUNG]
    # a share below the error of a screening is no reason to leave a layer in float
    (plan,) = schedule(float_layers=3, gains_on=gains_on).layers_in_float(scores)
    assert "stem" not in {s.anchor for s in plan.steps}


@pytest.mark.parametrize("damage", [0.0, None])
def test_where_no_damage_is_left_references_and_single_answers_are_all(
    damage: float | None,
) -> None:
    found = schedule()
    scores = scored(Plan(), RUNG)
    scores[""] = Score(plan="", macs=fake.MACS, damage=damage)
    plans = found.without_damage(scores)
    assert Plan((Step("keep_float", "stem"),)) in plans
    assert Plan((*RUNG.steps, Step("merge_separable", "dw1"))) in plans
    assert not found.layers_in_float(scores)
    assert not found.single_answers(scores)


def test_single_answers_build_on_the_better_of_rung_and_layers_in_float() -> None:
    answers = schedule().single_answers(scored(Plan(), RUNG, IN_FLOAT))
    assert Plan((*IN_FLOAT.steps, Step("merge_separable", "dw1"))) in answers
    worse = scored(Plan(), RUNG) | scored(IN_FLOAT, damage=9.0)
    answers = schedule().single_answers(worse)
    assert Plan((*RUNG.steps, Step("merge_separable", "dw1"))) in answers
    assert Plan((*IN_FLOAT.steps, Step("merge_separable", "dw1"))) not in answers


def test_references_stand_between_the_single_answers() -> None:
    """One before each two answers; the rest of the curve after the last."""
    found = schedule()
    scores = carried_out(found, 30)
    order = list(scores)
    curve = [t for t in order if t and all(w.startswith("keep_float@") for w in t.split())]
    answers = [t for t in order if t not in curve and len(t.split()) == 3]
    assert curve and answers
    assert order.index(curve[0]) < order.index(answers[0]) < order.index(answers[-1])
    assert [t.count("keep_float") for t in curve] == sorted(t.count("keep_float") for t in curve)


def test_a_rule_that_did_harm_wherever_it_was_asked_is_asked_no_more() -> None:
    space = fake.space()
    harmful = [Step("merge_separable", "dw0"), Step("merge_separable", "dw1")]
    plans = [space.repair([s]) for s in (*harmful, Step("replace_block", "stem"))]
    bad = scored(*plans[:1], damage=9.0)
    kept = module._without_harmful(plans, Plan(), 1.0, bad)
    assert kept == plans  # one strike
    third = Plan((Step("merge_separable", "dw2"),))
    both = scored(*plans[:2], damage=9.0)
    assert third not in module._without_harmful([*plans, third], Plan(), 1.0, both)
    helped = bad | scored(plans[1], damage=0.5)
    assert third in module._without_harmful([*plans, third], Plan(), 1.0, helped)


def test_the_front_is_predicted_from_what_the_answers_gain() -> None:
    found = schedule()
    scores = carried_out(found, 30)
    predicted = found.predicted(scores)
    best = Plan((*IN_FLOAT.steps, Step("merge_separable", "dw1")))
    assert best in predicted
    assert all(set(IN_FLOAT.steps) <= set(p.steps) for p in predicted)
    # what made it worse is not predicted
    assert not any(Step("replace_block", "stem") in p.steps for p in predicted)


def test_every_other_time_the_prediction_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    found = schedule()
    scores = carried_out(found, 40)
    asked: list[int] = []
    original: Callable[..., Any] = module.refitted

    def counting(*words: Any) -> Any:
        asked.append(len(words[3]))
        return original(*words)

    monkeypatch.setattr(module, "refitted", counting)
    if len(scores) % 2:
        scores |= scored(Plan((Step("keep_float", "other"),)))
    assert found.corrected(scores)
    odd = scores | scored(Plan((Step("keep_float", "another"),)))
    assert found.corrected(odd) == []
    assert asked == [len(scores)]


def test_a_plan_that_cannot_be_carried_out_is_not_wanted() -> None:
    merge = Step("merge_separable", "dw1")
    found = schedule(admits=lambda plan: merge not in plan.steps)
    scores = carried_out(found, 40)
    assert scores and not any(str(merge) in text for text in scores)


def test_a_phase_of_ones_own_comes_where_it_is_listed() -> None:
    class Longer(Schedule):
        @property
        def phases(self) -> tuple[module.Phase, ...]:
            mine = [Plan((Step("keep_float", "head"),))]
            return (self.ladder, lambda scores: mine, self.layers_in_float)

    known = schedule()
    longer = Longer(known.gm, known.space, known.sensitivity, known.trials)
    scores = carried_out(longer, 4)
    assert list(scores)[2] == "keep_float@head" and len(scores) == 4


def of_many_places() -> Schedule:
    """Eight layers, each of which may be merged; the earlier the more harmful."""
    names = [f"dw{i}" for i in range(8)]
    damage = {name: 0.2 / (i + 1) for i, name in enumerate(names)}
    sites = [Site(rule, (name,)) for name in names for rule in ("keep_float", "merge_separable")]
    sites.append(Site("fuse_expand", ("head",)))
    budget = Budget(macs=2 * fake.MACS, float_layers=1)
    space = make_space(sites, damage, fake.price, fake.MACS, budget)
    layers = [SimpleNamespace(node=n, layer=f"net.{n}", damage=d) for n, d in damage.items()]
    ranked: Any = SimpleNamespace(layers=layers, damage_by_node=lambda: damage)
    nothing: Any = None
    return module.worth_trying(nothing, space, ranked, 60)


def answers_of(found: Schedule, scores: dict[str, Score]) -> list[list[Plan]]:
    basis = found._basis(scores)
    assert basis is not None
    return found._rounds(basis, scores)


@pytest.mark.parametrize(("worse", "asked"), [(1.4, True), (1.6, False)])
def test_a_rule_is_given_up_where_it_left_half_as_much_again_at_two_places(
    worse: float, asked: bool
) -> None:
    """Both places are the ones that int8 harms most: it has less to gain at the others."""
    found = of_many_places()
    scores = scored(Plan(), RUNG, IN_FLOAT)
    bottom = scores[str(IN_FLOAT)].damage
    assert bottom is not None
    merges = [p for few in answers_of(found, scores) for p in few if "merge_separable" in str(p)]
    assert len(merges) > 2
    tried = scores | scored(*merges[:2], damage=worse * bottom)
    after = [p for few in answers_of(found, tried) for p in few]
    assert (merges[2] in after) == asked


def test_six_single_answers_come_before_the_first_try_of_the_best_together() -> None:
    rounds = answers_of(of_many_places(), scored(Plan(), RUNG, IN_FLOAT))
    assert len(rounds) > 1
    assert {len(few) for few in rounds[:-1]} == {6}


def test_one_reference_stands_before_each_two_answers() -> None:
    answers = [Plan((Step("equalize", a),)) for a in "abcd"]
    curve = [Plan((Step("keep_float", a),)) for a in "xyz"]
    order = module._interleaved(answers, iter(curve))
    assert order == [curve[0], *answers[:2], curve[1], *answers[2:]]


def test_no_step_is_trusted_to_leave_less_than_a_fiftieth() -> None:
    assert math.exp(-module._gain(0.3)) == pytest.approx(0.3)
    assert math.exp(-module._gain(0.0)) == pytest.approx(0.02)
