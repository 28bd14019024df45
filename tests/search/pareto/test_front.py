from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from search.pareto.front import (
    best,
    compare,
    hypervolume,
    knee,
    metric_error,
    paired_interval,
    pareto,
    resampled_means,
    select_front,
    undominated,
)
from search.run_dir.scores import Samples, Score


def brute_force_pareto(macs: list[float], value: list[float]) -> set[tuple[float, float]]:
    points = list(zip(macs, value, strict=True))
    return {
        p for p in points if not any((q[0] <= p[0] and q[1] >= p[1]) and q != p for q in points)
    }


@pytest.mark.parametrize("seed", range(20))
def test_pareto_agrees_with_brute_force_also_with_equal_coordinates(seed: int) -> None:
    random = np.random.default_rng(seed)
    macs, value = (
        random.integers(0, 12, 40).astype(float),
        random.integers(0, 12, 40).astype(float),
    )
    found = pareto(macs, value)
    points = [(macs[i], value[i]) for i in found]
    assert set(points) == brute_force_pareto(list(macs), list(value))
    assert len(points) == len(set(points))
    assert points == sorted(points)


def test_pareto_of_nothing_is_empty() -> None:
    assert len(pareto(np.empty(0), np.empty(0))) == 0


def scored(
    plan: str, macs: int, right: np.ndarray, damage: float, floats: int = 0
) -> tuple[Score, Samples]:
    mean = float(right.mean())
    score = Score(
        plan=plan,
        macs=macs,
        metric=mean,
        interval=(mean - 0.02, mean + 0.02),
        damage=damage,
        float_layers=floats,
    )
    return score, Samples(damage=np.full(len(right), damage), metric=right)


def front_of(*entries: tuple[Score, Samples], **options: object):
    samples = {score.plan: s for score, s in entries}
    return select_front([score for score, _ in entries], samples.get, **options)  # type: ignore[arg-type]


def right(n: int, wrong: list[int]) -> np.ndarray:
    values = np.ones(n)
    values[wrong] = 0
    return values


def test_a_metric_that_is_higher_by_noise_does_not_beat_less_damage() -> None:
    lucky = scored("a", 100, right(550, list(range(150))), 0.40)
    steady = scored("b", 100, right(550, list(range(2, 156))), 0.03)
    assert lucky[0].metric > steady[0].metric
    assert [s.plan for s in front_of(lucky, steady).points] == ["b"]


def test_a_metric_that_is_higher_in_fact_beats_less_damage() -> None:
    better = scored("a", 100, right(550, list(range(100))), 0.40)
    worse = scored("b", 100, right(550, list(range(180))), 0.03)
    assert [s.plan for s in front_of(better, worse).points] == ["a"]


def test_what_costs_more_for_damage_that_is_less_beyond_its_noise_is_a_point() -> None:
    cheap = scored("", 100, right(550, list(range(150))), 0.40)
    costly = scored("merge@x", 108, right(550, list(range(1, 153))), 0.05)
    assert costly[0].metric < cheap[0].metric
    front = front_of(cheap, costly)
    assert [s.plan for s in front.points] == ["", "merge@x"]
    assert not front.ties


@pytest.mark.parametrize(
    ("damage", "spread"),
    [(0.38, 0.0), (0.20, 6.0)],
    ids=["by a few percent", "within what samples vary by"],
)
def test_what_costs_more_for_damage_that_is_hardly_less_is_a_tie(
    damage: float, spread: float
) -> None:
    cheap = scored("", 100, right(550, list(range(150))), 0.40)
    score, values = scored("merge@x", 108, right(550, list(range(1, 153))), damage)
    noise = spread * np.random.default_rng(0).standard_normal(550)
    costly = score, replace(values, damage=values.damage + noise - noise.mean())
    front = front_of(cheap, costly)
    assert [s.plan for s in front.points] == [""]
    assert [s.plan for s in front.ties] == ["merge@x"]
    assert best(front).plan == "merge@x"


def test_a_costlier_tie_with_more_damage_is_beaten() -> None:
    cheap = scored("", 100, right(550, list(range(150))), 0.05)
    costly = scored("x@y", 108, right(550, list(range(2, 151))), 0.06)
    assert costly[0].metric > cheap[0].metric
    assert [s.plan for s in front_of(cheap, costly).all()] == [""]


@pytest.mark.parametrize("seed", range(10))
def test_the_front_of_random_plans_is_undominated_cheapest_first_and_never_empty(
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    entries = [
        scored(
            f"r@{i}",
            int(random.integers(100, 110)),
            (random.random(300) < random.uniform(0.5, 0.8)).astype(float),
            float(random.random()),
        )
        for i in range(30)
    ]
    front = front_of(*entries)
    assert front.points
    samples = {score.plan: values for score, values in entries}
    shown = front.all()
    assert [s.macs for s in shown] == sorted(s.macs for s in shown)
    for a, b in itertools.combinations(front.points, 2):  # a costs less than b
        gain = samples[b.plan].metric - samples[a.plan].metric
        noise = 1.959964 * np.sqrt(gain.var(ddof=1) / 300 + 1 / 300**2)
        assert gain.mean() > noise or 1.1 * b.damage < a.damage


def test_lower_is_better_turns_the_metric_over() -> None:
    low, high = (
        scored("low", 100, right(550, list(range(300))), 0.1),
        scored("high", 100, right(550, []), 0.1),
    )
    assert [s.plan for s in front_of(low, high, higher_is_better=False).points] == ["low"]


def test_without_labels_the_damage_is_the_objective() -> None:
    scores = [
        Score(plan=p, macs=m, damage=d)
        for p, m, d in (("", 10, 0.4), ("a@b", 12, 0.2), ("c@d", 11, 0.5))
    ]
    front = select_front(scores, lambda plan: None, objective="damage")
    assert [s.plan for s in front.points] == ["", "a@b"]
    assert best(front, objective="damage").plan == "a@b"


@pytest.mark.parametrize("objective", ["metric", "damage"])
@pytest.mark.parametrize(("damage", "chosen"), [(0.12, "equalize@model"), (0.13, "keep_float@x")])
def test_a_layer_in_float_has_to_gain_more_than_a_decibel(
    objective: str, damage: float, chosen: str
) -> None:
    outcome = right(550, list(range(150)))
    kept = scored("keep_float@x", 100, outcome, 0.1)
    kept = (replace(kept[0], float_layers=1), *kept[1:])
    entries = [scored("", 100, right(550, list(range(250))), 0.5), kept]
    entries.append(scored("equalize@model", 100, outcome, damage))
    front = front_of(*entries, objective=objective)
    assert best(front, objective=objective).plan == chosen
    assert [s.plan for s in front.points] == [chosen]


def test_failed_and_repeated_plans_are_left_out() -> None:
    good = scored("a@b", 10, right(50, [1]), 0.1)[0]
    failed = Score(plan="c@d", macs=5, error="planted")
    assert select_front([good, failed, good], lambda plan: None).points == (good,)
    assert select_front([failed], lambda plan: None).points == ()


def test_of_equals_the_plan_with_fewer_float_layers_is_kept() -> None:
    one, two = (
        scored(p, 10, right(50, [1]), 0.1, floats=f)[0] for p, f in (("a@b", 2), ("c@d", 1))
    )
    assert [s.plan for s in select_front([one, two], lambda plan: None).points] == ["c@d"]


def test_undominated_leaves_something_of_a_circle() -> None:
    better = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], dtype=np.int8)
    assert undominated(np.ones(3), better, np.arange(3)) == [2]


def test_standard_errors_are_those_of_paired_differences() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(3, 200)) + random.normal(size=200)  # correlated, as images are
    error = metric_error([Samples(damage=v, metric=v) for v in values])
    for i in range(3):
        for j in range(3):
            variance = np.var(values[i] - values[j], ddof=1) / 200
            one_more = (values.max() - values.min()) / 200
            assert error[i, j] ** 2 == pytest.approx(variance + one_more**2, abs=1e-9)


@pytest.mark.parametrize(("gained", "certain"), [(4, False), (7, True)])
def test_a_handful_of_images_is_no_proof(gained: int, certain: bool) -> None:
    a, b = right(550, list(range(150))), right(550, list(range(gained, 150)))
    error = metric_error([Samples(damage=a, metric=a), Samples(damage=b, metric=b)])
    assert (abs(a.mean() - b.mean()) > 1.96 * error[0, 1]) == certain


def test_replicates_give_the_error_of_a_metric_that_is_no_mean() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 500))
    error = metric_error([Samples(damage=a, replicates=a), None, Samples(damage=b, replicates=b)])
    assert error[0, 2] == pytest.approx(np.std(a - b, ddof=1))
    assert error[0, 1] == error[1, 2] == 0


def test_compare_uses_the_damage_where_the_metric_is_uncertain() -> None:
    better = compare(np.array([0.70, 0.71]), np.array([0.1, 0.2]), np.full((2, 2), 0.02))
    assert better.tolist() == [[0, 1], [-1, 0]]


def test_paired_interval_is_narrower_than_the_samples_are_noisy_and_repeats() -> None:
    random = np.random.default_rng(1)
    reference = (random.random(550) < 0.7).astype(float)
    int8 = reference.copy()
    int8[:10] = 1 - int8[:10]
    low, high = paired_interval(int8, reference, float(reference.mean()))
    assert (low, high) == paired_interval(int8, reference, float(reference.mean()))
    assert low < int8.mean() < high
    spread = np.std(int8 - reference) / np.sqrt(550)
    assert (high - low) == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert paired_interval(reference, reference, 0.7) == (0.7, 0.7)


def test_paired_interval_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        difference = random.choice([-1.0, 0.0, 1.0], 400, p=(0.06, 0.9, 0.04))
        low, high = paired_interval(difference, np.zeros(400), 0.0, seed=seed, resamples=500)
        covered += low <= -0.02 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_resampled_means_do_not_depend_on_how_they_are_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(0).normal(size=50)
    means = resampled_means(values, 300, 1)
    assert abs(means.mean() - values.mean()) < 0.05
    assert means.std() == pytest.approx(values.std() / np.sqrt(50), rel=0.15)


def test_hypervolume_of_two_points_is_the_sum_of_two_rectangles() -> None:
    macs, value = np.array([1.0, 2.0, 9.0, 1.5]), np.array([0.5, 0.8, 0.9, 0.4])
    assert hypervolume(macs, value, (3.0, 0.2)) == pytest.approx(1 * 0.3 + 1 * 0.6)
    assert hypervolume(np.array([4.0]), np.array([1.0]), (3.0, 0.2)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_agrees_with_counting_random_darts(seed: int) -> None:
    random = np.random.default_rng(seed)
    macs, value = random.random((2, 12))
    darts = random.random((40_000, 2))
    hit = ((macs[None] <= darts[:, :1]) & (value[None] >= darts[:, 1:])).any(1).mean()
    assert hypervolume(macs, value, (1.0, 0.0)) == pytest.approx(hit, abs=0.01)


def test_knee_is_where_more_compute_buys_little() -> None:
    assert knee(np.array([1.0, 1.1, 1.5, 2.0]), np.array([0.60, 0.70, 0.71, 0.715])) == 1
    assert knee(np.array([2.0, 1.0]), np.array([0.7, 0.6])) == 1
    assert knee(np.array([2.0, 1.0]), np.array([0.7, 0.6]), extent=(20.0, 0.2)) == 0
    assert knee(np.array([2.0, 1.0]), np.array([0.7, 0.6]), extent=(1.5, 0.2)) == 1
    assert knee(np.array([1.0]), np.array([0.7])) == 0
