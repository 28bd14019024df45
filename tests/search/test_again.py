"""A search that ends for all workers when one has met the goal, and plans that get more time than they had."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewriter import Plan
from search.run import Goal, noted_goal
from search.run_dir.files import read_json
from search.run_dir.scores import Records, Score
from search.run_dir.validation import fault_of_run
from search.scoring import bench
from search.scoring.child_process import possible
from search.scoring.failure import to_be_tried_again
from search.study.storage import journal
from search.study.study import Outcome, Settings, search
from tests.search import fake
from tests.search.cli.test_main import quantfix, write_config
from tests.search.scoring.test_evaluator import make, network
from tests.search.study.test_study import trials, worth

__all__ = ["network"]
SLOW = "merge_separable@dw0"
needs_fork = pytest.mark.skipif(not possible("cpu"), reason="needs Linux without CUDA")


class Timed(fake.FakeEvaluator):
    """One plan takes ten seconds, by its own account."""

    def __init__(self, records: Records, limit_s: float) -> None:
        super().__init__(records)
        self.limit_s = limit_s

    def __call__(self, plan: Plan) -> Score:
        known = self.records.get(str(plan))
        if known is not None and not to_be_tried_again(known, self.limit_s):
            return known
        if str(plan) != SLOW or self.limit_s >= 10:
            score = super().__call__(plan) if known is None else self.anew(plan)
        else:
            self.scored.append(str(plan))
            score = Score(plan=SLOW, macs=fake.MACS, error="took longer", limit_s=self.limit_s)
            self.records.add(score)
        return score

    def anew(self, plan: Plan) -> Score:
        self.scored.append(str(plan))
        score = Score(plan=str(plan), macs=fake.MACS, metric=0.7, damage=fake.fake_damage(plan))
        self.records.add(score)
        return score


def run(
    folder: Path, limit_s: float, count: int = 20, enough: Callable[[Score], bool] | None = None
) -> tuple[Outcome, Timed]:
    records = Records(folder, "f")
    evaluate = Timed(records, limit_s)
    settings = Settings(
        name="s", trials=count, again=lambda score: to_be_tried_again(score, limit_s)
    )
    more: dict[str, Any] = {} if enough is None else {"enough": enough}
    place = journal(folder / "journal.log")
    return search(evaluate, records, fake.space(), worth, settings, place, **more), evaluate


def test_a_plan_that_had_too_little_time_is_scored_when_there_is_more(tmp_path: Path) -> None:
    first, evaluate = run(tmp_path, 5.0)
    assert first.plans == 20
    assert evaluate.scored.count(SLOW) == 1
    for limit_s in (5.0, 2.0):  # with as little time, or less, it is left alone
        again, evaluate = run(tmp_path, limit_s)
        assert (again.plans, evaluate.scored) == (20, [])
    again, evaluate = run(tmp_path, 10.0)
    assert (again.plans, evaluate.scored) == (20, [SLOW])
    found = Records(tmp_path, "f").get(SLOW)
    assert found is not None
    assert (found.error, found.damage) == (None, fake.fake_damage(Plan.parse(SLOW)))
    states = [t.state.name for t in trials(tmp_path) if t.user_attrs["plan"] == SLOW]
    assert states == ["FAIL", "COMPLETE"]
    again, evaluate = run(tmp_path, 20.0, count=22)
    assert (again.plans, len(evaluate.scored)) == (22, 2)
    assert SLOW not in evaluate.scored


def test_a_plan_that_is_slow_again_is_not_tried_for_ever(tmp_path: Path) -> None:
    run(tmp_path, 2.0)
    again, evaluate = run(tmp_path, 5.0)
    assert (again.plans, evaluate.scored) == (20, [SLOW])
    assert (again.reason, Records(tmp_path, "f").get(SLOW)) == (
        "trials",
        Score(plan=SLOW, macs=fake.MACS, error="took longer", limit_s=5.0),
    )


@needs_fork
def test_the_limit_is_kept_with_the_failure_and_a_higher_one_scores_the_plan(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = make(network, tmp_path, limit_s=1.0)
    whole = bench.assemble

    def assemble(*words: Any) -> Any:
        time.sleep(2.0 if evaluate.limit_s == 1.0 else 0.0)
        return whole(*words)

    monkeypatch.setattr(bench, "assemble", assemble)
    score = evaluate(Plan())
    assert (score.limit_s, evaluate(Plan())) == (1.0, score)
    assert score.error is not None
    evaluate = replace(evaluate, limit_s=60.0)
    assert evaluate(Plan()).error is None
    stored = Records(tmp_path, "f").get("")
    assert stored is not None
    assert stored.damage == evaluate(Plan()).damage


def test_the_goal_ends_a_search_whoever_meets_it(tmp_path: Path) -> None:
    """One worker scores slowly; another meets the goal meanwhile, and then both are done."""
    met, outcomes = threading.Event(), dict[str, Outcome]()
    goal = min(map(fake.fake_damage, worth({})))

    class Slow(fake.FakeEvaluator):
        def __call__(self, plan: Plan) -> Score:
            met.wait(60)
            return super().__call__(plan)

    def work(name: str, kind: type[fake.FakeEvaluator]) -> None:
        records = Records(tmp_path, "f")
        place = journal(tmp_path / "journal.log")
        evaluate, settings = kind(records), Settings(name="s", trials=1000)
        outcomes[name] = search(
            evaluate, records, fake.space(), worth, settings, place,
            enough=lambda score: score.damage is not None and score.damage <= goal,
        )  # fmt: skip
        met.set()

    threads = [
        threading.Thread(target=work, args=(k.__name__, k)) for k in (Slow, fake.FakeEvaluator)
    ]
    threads[0].start()
    while not (tmp_path / "workers").exists() or not list((tmp_path / "workers").iterdir()):
        time.sleep(0.001)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert {k: o.reason for k, o in outcomes.items()} == {"Slow": "goal", "FakeEvaluator": "goal"}
    assert all(t.state.is_finished() for t in trials(tmp_path))


def test_a_goal_met_before_needs_no_other_plan(tmp_path: Path) -> None:
    _, evaluate = run(tmp_path, 10.0, count=6)
    last = evaluate.scored[-1]
    outcome, evaluate = run(tmp_path, 10.0, enough=lambda score: score.plan == last)
    assert (outcome.reason, evaluate.scored) == ("goal", [])


def test_workers_read_the_goal_from_the_run() -> None:
    facts = {"goal": {"max_drop": 1.5, "max_damage": None}}
    assert noted_goal(facts) == Goal(max_drop=1.5)
    assert noted_goal({"goal": None}) is noted_goal({}) is None
    assert fault_of_run(facts) == ""
    assert "goal" in fault_of_run({"goal": {"max_drop": "much"}})


@pytest.mark.slow
def test_fix_with_two_workers_stops_when_its_goal_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, search={"trials": 500, "max_macs": 3.0})
    out = tmp_path / "out"
    words = ("--max-drop", 100, "--workers", 2, "-q")
    assert quantfix(monkeypatch, "fix", config, "--out", out, *words) == 0
    assert read_json(out / "run.json")["goal"]["max_drop"] == 100
    # any plan meets it: each worker is at one plan at most when the first is done
    assert len((out / "scores.jsonl").read_text().splitlines()) < 30
    assert list((out / "workers").iterdir()) == []
