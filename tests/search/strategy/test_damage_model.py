from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rewriter.plan import Plan, Step
from search.run_dir.scores import Score
from search.strategy import schedule as worth
from search.strategy.damage_model import refitted
from search.strategy.space import Budget
from tests.search import fake

STEPS = [Step("keep_float", name) for name in "abcdef"]
BASE = Plan((Step("replace_block", "stem"),))
BOTTOM = 0.4


def scored(steps: list[Step], damage: float, **more: object) -> Score:
    return Score(plan=str(Plan((*BASE.steps, *steps))), macs=1, damage=damage, **more)  # type: ignore[arg-type]


def by_plan(*scores: Score) -> dict[str, Score]:
    return {s.plan: s for s in (scored([], BOTTOM), *scores)}


def test_a_law_that_holds_exactly_is_found_from_plans_of_many_steps() -> None:
    """The prior is wrong by as much as it says it may be; twenty plans correct it."""
    random = np.random.default_rng(0)
    true = {s: float(g) for s, g in zip(STEPS, random.uniform(0.1, 1.0, 6), strict=True)}
    believed = {s: g * float(random.uniform(0.6, 1.4)) for s, g in true.items()}
    found: list[Score] = []
    for _ in range(20):
        steps = [s for s in STEPS if random.random() < 0.5]
        found.append(scored(steps, BOTTOM * math.exp(-sum(true[s] for s in steps))))
    gains = refitted(believed, frozenset(), BASE, by_plan(*found))
    for step in STEPS:
        assert abs(gains.mean[step] - true[step]) < 0.35 * abs(believed[step] - true[step]) + 0.01
        assert gains.deviation[step] < 0.1


def test_it_is_the_posterior_of_a_linear_model() -> None:
    """Against the textbook's form in the space of the steps, which inverts another matrix."""
    believed = {s: 0.2 + 0.1 * i for i, s in enumerate(STEPS)}
    measured = frozenset(STEPS[:3])
    plans = [[STEPS[0], STEPS[3]], [STEPS[1]], STEPS[:5]]
    found = [scored(p, 0.1 + 0.05 * i) for i, p in enumerate(plans)]
    gains = refitted(believed, measured, BASE, by_plan(*found))
    prior = np.array([believed[s] for s in STEPS])
    scale = np.array([0.3 if s in measured else 1.0 for s in STEPS]) * prior + 0.03
    x = np.array([[s in p for s in STEPS] for p in plans], dtype=float)
    y = np.array([-math.log((s.damage or 0) / BOTTOM) for s in found])
    precision = np.diag(1 / scale**2) + x.T @ x / 0.1**2
    mean = np.linalg.solve(precision, prior / scale**2 + x.T @ y / 0.1**2)
    deviation = np.sqrt(np.diag(np.linalg.inv(precision)))
    assert list(gains.mean.values()) == pytest.approx(mean)
    assert list(gains.deviation.values()) == pytest.approx(deviation)


def test_without_plans_of_these_steps_it_is_what_was_believed() -> None:
    believed = dict.fromkeys(STEPS, 0.5)
    gains = refitted(believed, frozenset(STEPS[:1]), BASE, by_plan())
    assert gains.mean == believed
    assert gains.deviation[STEPS[0]] == pytest.approx(0.18)
    assert gains.deviation[STEPS[1]] == pytest.approx(0.53)
    assert gains.hoped()[STEPS[1]] == pytest.approx(1.03)


@pytest.mark.parametrize(
    "more", [{"error": "planted"}, {"stopped": True}, {"damage": None}, {"damage": 0.0}]
)
def test_plans_that_say_nothing_about_the_damage_do_not_count(more: dict[str, object]) -> None:
    believed = dict.fromkeys(STEPS, 0.5)
    values = {"damage": 0.001} | more
    plan = Score(plan=str(Plan((*BASE.steps, STEPS[0]))), macs=1, **values)  # type: ignore[arg-type]
    assert refitted(believed, frozenset(), BASE, by_plan(plan)).mean == believed


def test_a_plan_without_the_base_does_not_count() -> None:
    believed = dict.fromkeys(STEPS, 0.5)
    plan = Score(plan=str(Plan((STEPS[0],))), macs=1, damage=0.001)
    assert refitted(believed, frozenset(), BASE, by_plan(plan)).mean == believed


@pytest.fixture
def no_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network as it is is the best rung."""
    monkeypatch.setattr(worth, "find_sites", lambda gm: [])
    monkeypatch.setattr(worth, "exact_splits", lambda gm, sites, damage: [])
    monkeypatch.setattr(worth, "rungs", lambda gm, scores, splits, most: ())
    monkeypatch.setattr(worth, "start", lambda ladder: Plan())


def ranked() -> SimpleNamespace:
    layers = [SimpleNamespace(node=n, layer=f"net.{n}", damage=d) for n, d in fake.DAMAGE.items()]
    return SimpleNamespace(layers=layers, damage_by_node=lambda: fake.DAMAGE)


@pytest.mark.usefixtures("no_ladder")
def test_the_layers_in_float_are_those_that_hurt_the_best_rung() -> None:
    """Not those that hurt plain int8; and the rung is screened once."""
    space = fake.space(Budget(macs=1.3 * fake.MACS, float_layers=1))
    asked: list[Plan] = []

    def gains_on(plan: Plan) -> dict[str, float]:
        asked.append(plan)
        return {"net.head": 0.6, "net.dw0": 0.1, "net.pw0": -0.2, "net.gone": 0.9}

    scores = {"": Score(plan="", macs=fake.MACS, damage=fake.TOTAL)}
    found: Any = ranked()
    for gains, layer in ((gains_on, "head"), (None, "dw0")):
        following = worth.worth_trying(None, space, found, 30, gains_on=gains)  # type: ignore[arg-type]
        first = next(p for p in following(scores) if str(p) not in scores)
        assert str(first) == f"keep_float@{layer}"
        assert following(scores) == following(scores)
    assert asked == [Plan()]


@pytest.mark.usefixtures("no_ladder")
def test_a_search_predicts_anew_every_other_time_and_believes_what_it_saw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is worthless beside each other is not predicted together again."""
    space = fake.space(Budget(macs=1.3 * fake.MACS, float_layers=0))
    found: Any = ranked()
    following = worth.worth_trying(None, space, found, 30)  # type: ignore[arg-type]
    merges = {Step("merge_separable", "dw0"), Step("merge_separable", "dw1")}
    scores: dict[str, Score] = {}

    def score(plan: Plan) -> None:
        damage = fake.TOTAL
        for step in plan.steps:
            damage *= 1 - fake.GAIN.get(step, 0.0) / fake.TOTAL
        if merges <= set(plan.steps):
            damage *= 3
        macs = space.predicted_macs(plan)
        scores[str(plan)] = Score(plan=str(plan), macs=macs, damage=damage)

    anew: list[int] = []

    def counting(*words: Any) -> Any:
        anew.append(len(scores))
        return refitted(*words)

    monkeypatch.setattr(worth, "refitted", counting)
    asked: list[Plan] = []
    for turn in range(20):
        wanted = [p for p in following(scores) if str(p) not in scores]  # type: ignore[arg-type]
        asked += wanted[:1]
        # where nothing is predicted, TPE tries something
        score(wanted[0] if wanted else Plan((Step("keep_float", f"other{turn}"),)))
    assert sum(merges <= set(plan.steps) for plan in asked) == 1
    assert anew == list(range(min(anew), 20, 2))
    assert min(anew) % 2 == 0


@pytest.mark.usefixtures("no_ladder")
def test_the_best_answers_are_tried_together_before_all_are_known() -> None:
    """On top of the layers in float that help; and what an answer added alone decides."""
    space = fake.space(Budget(macs=1.3 * fake.MACS, float_layers=1))
    found: Any = ranked()

    def gains_on(plan: Plan) -> dict[str, float]:
        return {"net.head": 0.5}

    helps = {
        Step("keep_float", "head"): 0.5,
        Step("merge_separable", "dw0"): 0.5,
        Step("merge_separable", "dw1"): 0.8,
        Step("replace_block", "stem"): 1.2,
    }
    following = worth.worth_trying(None, space, found, 30, gains_on=gains_on)  # type: ignore[arg-type]
    scores: dict[str, Score] = {}
    order: list[Plan] = []
    while wanted := [p for p in following(scores) if str(p) not in scores][:1]:  # type: ignore[arg-type]
        (plan,) = wanted
        order.append(plan)
        damage = fake.TOTAL * math.prod(helps.get(step, 1.0) for step in plan.steps)
        macs = space.predicted_macs(plan)
        scores[str(plan)] = Score(plan=str(plan), macs=macs, damage=damage)
        if len(order) > 12:
            break
    texts = [" ".join(sorted(str(plan).split())) for plan in order]
    alone = [text for text in texts if "keep_float@head" in text and text.count("@") == 2]
    assert set(alone) == {
        f"keep_float@head {answer}"
        for answer in ("merge_separable@dw0", "merge_separable@dw1", "replace_block@stem")
    }
    together = "keep_float@head merge_separable@dw0 merge_separable@dw1"
    assert texts[1] == "keep_float@head"
    assert 0 < texts.index(together) - max(map(texts.index, alone)) <= 2
