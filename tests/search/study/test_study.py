from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from rewriter.plan import Plan
from search.run_dir.scores import Records, Score
from search.strategy.space import Budget, predicted_front, reference_plans, single_plans
from search.study.storage import journal
from search.study.study import Settings, search
from tests.search import fake

BUDGET = Budget(macs=1.15 * fake.MACS, float_layers=2)


def worth(scores: Mapping[str, Score]) -> list[Plan]:
    space = fake.space(BUDGET)
    first = reference_plans(
        sorted(fake.DAMAGE, key=lambda n: -fake.DAMAGE[n]), space
    ) + single_plans(space)
    return first + [plan for plan, _ in predicted_front(space, fake.GAIN, fake.TOTAL)]


def run(
    folder: Path, trials: int = 30, seed: int = 0, evaluate=None, budget=BUDGET, on_score=None
):
    records = Records(folder, "f")
    evaluate = evaluate or fake.FakeEvaluator(records)
    evaluate.records = records
    settings = Settings(name="s", trials=trials, seed=seed)
    extra = {} if on_score is None else {"on_score": on_score}
    outcome = search(
        evaluate,
        records,
        fake.space(budget),
        worth,
        settings,
        journal(folder / "journal.log"),
        **extra,
    )
    return outcome, evaluate, records


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="s", storage=journal(folder / "journal.log")).trials


def test_scores_each_plan_once_and_the_empty_one_first(tmp_path: Path) -> None:
    outcome, evaluate, records = run(tmp_path)
    assert outcome.reason == "trials"
    assert outcome.plans == 30
    assert evaluate.scored[:3] == ["", "keep_float@dw0", "keep_float@dw0 keep_float@dw1"]
    assert len(set(evaluate.scored)) == len(evaluate.scored) == len(records) == 30


def test_finds_the_best_plan_within_the_budget(tmp_path: Path) -> None:
    _, _, records = run(tmp_path)
    space = fake.space(BUDGET)
    plans = space.all_plans(20_000)
    assert plans is not None
    feasible = {str(p) for p in plans}
    best = min(fake.fake_damage(p) for p in plans)
    found: list[Any] = [s.damage for s in records.scores() if s.plan in feasible]
    assert min(found) == pytest.approx(best)


def test_each_trial_carries_what_a_dashboard_shows_and_its_constraints(tmp_path: Path) -> None:
    run(tmp_path, trials=8)
    for trial in trials(tmp_path):
        assert {"plan", "metric", "macs", "engine", "interval"} <= trial.user_attrs.keys()
        floats = trial.user_attrs["plan"].count("keep_float@")
        assert trial.constraints["max_float_layers"] == floats - 2
        assert trial.constraints["max_macs"] == trial.values[0] - 1.15 * fake.MACS


def test_stops_when_the_space_is_exhausted(tmp_path: Path) -> None:
    budget = Budget(macs=1.09 * fake.MACS, float_layers=0)
    outcome, evaluate, _ = run(tmp_path, trials=1000, budget=budget)
    plans = fake.space(budget).all_plans(20_000)
    assert plans is not None
    assert outcome.reason == "exhausted"
    assert sorted(evaluate.scored) == sorted(map(str, plans))


def test_the_same_call_again_does_only_what_is_missing(tmp_path: Path) -> None:
    run(tmp_path, trials=12)
    outcome, evaluate, _ = run(tmp_path, trials=12)
    assert (outcome.plans, evaluate.scored) == (12, [])
    outcome, evaluate, _ = run(tmp_path, trials=15)
    assert (outcome.plans, len(evaluate.scored)) == (15, 3)


@pytest.mark.slow
def test_the_seed_decides_and_the_same_seed_repeats(tmp_path: Path) -> None:
    one, two, other = (
        run(tmp_path / n, seed=s)[1].scored for n, s in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == two
    assert one != other


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", ["before scoring", "after scoring"])
def test_an_interrupted_run_goes_the_way_of_an_undisturbed_one(tmp_path: Path, after: str) -> None:
    _, whole, _ = run(tmp_path / "whole", trials=30)

    class Dying(fake.FakeEvaluator):
        def __call__(self, plan: Plan) -> Score:
            if after == "before scoring" and len(self.scored) == 7:
                raise Killed
            score = super().__call__(plan)
            if after == "after scoring" and len(self.scored) == 8:
                raise Killed
            return score

    folder = tmp_path / "parts"
    seen: list[str] = []
    for _ in range(10):
        evaluate = Dying(Records(folder, "f"))
        try:
            run(folder, trials=30, evaluate=evaluate)
        except Killed:
            seen += evaluate.scored
            continue
        seen += evaluate.scored
        break
    assert seen == whole.scored
    assert all(t.state.is_finished() for t in trials(folder))


def _die(folder: Path) -> None:
    import os

    class Dying(fake.FakeEvaluator):
        def __call__(self, plan: Plan) -> Score:
            if len(self.scored) == 5:
                os._exit(9)
            return super().__call__(plan)

    run(folder, trials=20, evaluate=Dying(Records(folder, "f")))


@pytest.mark.slow
def test_no_trial_of_a_process_that_died_is_left_running(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die, args=(tmp_path / "a",))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert any(not t.state.is_finished() for t in trials(tmp_path / "a"))
    outcome, _, records = run(tmp_path / "a", trials=20)
    _, whole, _ = run(tmp_path / "b", trials=20)
    assert outcome.plans == 20
    assert [s.plan for s in records.scores()] == whole.scored
    assert all(t.state.is_finished() for t in trials(tmp_path / "a"))


def test_a_plan_that_fails_is_recorded_and_not_tried_again(tmp_path: Path) -> None:
    records = Records(tmp_path, "f")
    evaluate = fake.FakeEvaluator(records, fails=frozenset({"merge_separable@dw0"}))
    outcome, _, records = run(tmp_path, evaluate=evaluate)
    assert outcome.plans == 30
    assert evaluate.scored.count("merge_separable@dw0") == 1
    assert [s.plan for s in records.scores() if s.error] == ["merge_separable@dw0"]
    assert [
        t.state.name for t in trials(tmp_path) if t.user_attrs["plan"] == "merge_separable@dw0"
    ] == ["FAIL"]


def test_a_plan_known_from_elsewhere_is_answered_and_not_counted(tmp_path: Path) -> None:
    records = Records(tmp_path, "f")
    fake.FakeEvaluator(records)(Plan.parse("merge_separable@dw0"))
    outcome, evaluate, _ = run(tmp_path, trials=12)
    assert outcome.plans == 12
    assert len(evaluate.scored) == 12
    assert "merge_separable@dw0" not in evaluate.scored
    assert "merge_separable@dw0" in [t.user_attrs["plan"] for t in trials(tmp_path)]


def test_what_user_code_raises_ends_the_search_and_leaves_no_trial_running(tmp_path: Path) -> None:
    class Broken(fake.FakeEvaluator):
        def __call__(self, plan: Plan) -> Score:
            if len(self.scored) == 3:
                raise ZeroDivisionError("in the user's metric")
            return super().__call__(plan)

    with pytest.raises(ZeroDivisionError, match="the user's metric"):
        run(tmp_path, evaluate=Broken(Records(tmp_path, "f")))
    assert all(t.state.is_finished() for t in trials(tmp_path))


def test_timeout_begins_no_new_plan(tmp_path: Path) -> None:
    records = Records(tmp_path, "f")
    settings = Settings(name="s", timeout_s=0.0)
    outcome = search(
        fake.FakeEvaluator(records),
        records,
        fake.space(),
        worth,
        settings,
        journal(tmp_path / "j.log"),
    )
    assert outcome.reason == "timeout"
    assert len(records) == 0


def _work(folder: Path) -> None:
    run(folder, trials=24)


@pytest.mark.slow
def test_two_workers_share_the_plans(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0, 0]
    records = Records(tmp_path, "f")
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert len(records) == len(lines) == 24
    assert all(t.state.is_finished() for t in trials(tmp_path))


@pytest.mark.parametrize("taken", [False, True])
def test_a_queue_that_others_emptied_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """Between the look at the queue and the claim a faster worker takes all that was seen."""
    pop, calls = optuna.Study._pop_waiting_trial_id, []

    def too_late(study: optuna.Study) -> int | None:
        calls.append(0)
        if len(calls) % 3:
            return pop(study)
        if taken:  # and nothing is left in exchange
            claimed = pop(study)
            assert claimed is not None
            study.tell(claimed, state=optuna.trial.TrialState.FAIL)
        return None

    monkeypatch.setattr(optuna.Study, "_pop_waiting_trial_id", too_late)
    _, _, records = run(tmp_path, trials=9)
    assert len(records) == 9
    assert all(t.state.is_finished() for t in trials(tmp_path))


def test_a_journal_whose_last_line_is_half_written_still_opens(tmp_path: Path) -> None:
    run(tmp_path, trials=5)
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(b'{"op_code": 6, "trial')
    outcome, evaluate, _ = run(tmp_path, trials=6)
    assert (outcome.plans, len(evaluate.scored)) == (6, 1)
