from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewriter import Plan, profile, target, trace
from search.data.evaluation_set import load_samples, shuffled
from search.pareto.front import select_front
from search.run_dir.scores import Records, Samples, Score
from search.scoring.evaluator import RewriteEvaluator
from search.scoring.racing import Race
from search.tasks.classification import Classification
from tests.search import small


def scored(plan: str, macs: int, damage: np.ndarray, right: np.ndarray) -> tuple[Score, Samples]:
    score = Score(plan=plan, macs=macs, metric=float(right.mean()), damage=float(damage.mean()))
    return score, Samples(damage=damage, metric=right)


def seen(values: tuple[Score, Samples], count: int) -> tuple[Score, Samples]:
    score, samples = values
    assert samples.metric is not None
    return scored(score.plan, score.macs, samples.damage[:count], samples.metric[:count])


def test_looks_double_and_few_samples_are_never_raced() -> None:
    race = Race(rivals=list, least=64, spared=lambda plan: not plan.steps)
    plan = Plan.parse("keep_float@a")
    assert race.looks(plan, 600) == [64, 128, 256, 600]
    assert race.looks(plan, 256) == [64, 128, 256]
    assert race.looks(plan, 255) == [255]
    assert race.looks(Plan(), 600) == [600]
    assert Race(rivals=list, least=0).looks(plan, 600) == [600]


def population(seed: int) -> list[tuple[Score, Samples]]:
    """Plans whose damage and metric share what varies between images."""
    random = np.random.default_rng(seed)
    image = random.gamma(0.5, 1.0, 400)
    hard = random.random(400)
    found = []
    for i in range(25):
        level = 10 ** random.uniform(-2, 0)
        damage = level * image * random.gamma(2.0, 0.5, 400)
        right = (hard > 0.25 + 0.3 * level + 0.05 * random.normal(size=400)).astype(float)
        found.append(scored(f"r@{i}", int(random.integers(100, 110)), damage, right))
    return found


@pytest.mark.parametrize("objective", ["damage", "metric"])
def test_hardly_a_plan_of_the_final_front_is_lost(objective: str) -> None:
    """Judged by the front that all plans make on all samples, which the race does not see."""
    lost = wrong = on_front = 0
    for seed in range(40):
        plans = population(seed)
        samples = {s.plan: v for s, v in plans}
        known: list[tuple[Score, Samples]] = []
        final = {
            s.plan
            for s in select_front([s for s, _ in plans], samples.get, objective=objective).all()
        }
        race = Race(rivals=lambda known=known: known, objective=objective)
        for plan in plans:
            stopped = any(race.lost(*seen(plan, n), 400) for n in race.looks(Plan(), 400)[:-1])
            lost += stopped
            wrong += stopped and plan[0].plan in final
            on_front += plan[0].plan in final
            if not stopped:
                known.append(plan)
    assert lost > 400  # of 1000
    assert wrong <= 0.02 * on_front


def test_what_costs_less_than_every_rival_or_has_no_values_is_never_lost() -> None:
    n = np.arange(400) % 2
    rival = scored("a@a", 100, 0.01 * (1 + n), np.ones(400))
    bad = scored("b@b", 100, 1.0 + n, np.zeros(400))
    race = Race(rivals=lambda: [rival])
    assert race.lost(*seen(bad, 64), 400)
    cheap = scored("b@b", 99, 1.0 + n, np.zeros(400))
    assert not race.lost(*seen(cheap, 64), 400)
    assert not race.lost(bad[0], Samples(damage=bad[1].damage[:64]), 400)
    better = scored("c@c", 100, 1.0 + n, np.ones(400))  # more damage, but as good a metric
    assert race.lost(*seen(better, 64), 400)  # a tie to the last image is within one sample
    worse = scored("a@a", 100, 0.01 * (1 + n), (np.arange(400) % 3 > 0).astype(float))
    assert not Race(rivals=lambda: [worse]).lost(*seen(better, 64), 400)


@pytest.fixture
def raced(tmp_path: Path) -> RewriteEvaluator:
    data = small.data(count=300)
    gm = trace(small.small(), torch.randn(2, 3, 16, 16))
    calibration = [torch.stack([data.calibration[i] for i in range(16)])]
    profile(gm, calibration)
    made: Any = RewriteEvaluator(
        gm=gm, scheme=target("per_tensor"), task=Classification(), calibration=calibration,
        samples=load_samples(data.evaluation, order=shuffled(300)), records=Records(tmp_path, "f"),
        threads=1,
    )  # fmt: skip
    return made


def test_a_plan_given_up_is_marked_and_can_still_be_scored_in_full(
    raced: RewriteEvaluator,
) -> None:
    good, bad = Plan.parse("keep_float@dw_0 keep_float@pw"), Plan.parse("keep_float@fc")
    plain = raced(good)
    values = raced.records.samples(str(good))
    assert values is not None
    # a rival with the same images and next to no damage
    rival = Samples(damage=values.damage * 1e-6, metric=np.ones(300))
    raced = replace(raced, race=Race(rivals=lambda: [(plain, rival)], least=64))
    score = raced(bad)
    assert score.stopped
    assert score.samples == 64
    assert score.interval is not None
    assert score.damage is not None
    known = raced.records.get(str(bad))
    assert known == score
    front = select_front(raced.records.scores(), raced.records.samples)
    assert str(bad) not in [s.plan for s in front.all()]
    assert raced(bad) == score  # not run again
    whole = raced.score(bad, race=False)
    assert not whole.stopped
    assert whole.samples == 300
    assert Records(raced.records.folder, "f").get(str(bad)) == whole
    ((again, _),) = raced.measure(bad, [raced.choosing])
    assert (again.metric, again.damage) == (whole.metric, whole.damage)
