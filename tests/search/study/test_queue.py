"""Trials that a user enqueues with Optuna itself are scored before all others."""

from __future__ import annotations

import logging
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from rewriter.plan import Plan
from search.run_dir.scores import Records, Score
from search.strategy.space import KEEP
from search.study.storage import journal
from tests.search import fake
from tests.search.study.test_study import BUDGET, Killed, run, trials


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=journal(folder / "journal.log"))


def slot_with(rule: str, anchor: str) -> str:
    plan = Plan.parse(f"{rule}@{anchor}")
    choice = fake.space(BUDGET).choice(plan)
    assert choice is not None
    return next(slot for slot, chosen in choice.items() if chosen == rule)


DW1 = slot_with("keep_float", "dw1")
DW0 = slot_with("merge_separable", "dw0")


def test_an_enqueued_trial_is_scored_next_and_says_nothing_of_other_slots(tmp_path: Path) -> None:
    run(tmp_path, trials=3)
    study_of(tmp_path).enqueue_trial({DW1: "keep_float", DW0: "merge_separable"})
    _, evaluate, _ = run(tmp_path, trials=5)
    assert set(evaluate.scored[0].split()) == {"keep_float@dw1", "merge_separable@dw0"}
    (asked,) = [t for t in trials(tmp_path) if t.user_attrs.get("enqueued")]
    assert asked.state == TrialState.COMPLETE
    others = {slot: rule for slot, rule in asked.params.items() if slot not in (DW0, DW1)}
    assert set(others.values()) == {KEEP}
    assert set(asked.params) == set(fake.space(BUDGET).choices)


def test_more_than_the_budget_waits_for_the_next_run(tmp_path: Path) -> None:
    run(tmp_path, trials=1)
    for rule in ("keep_float", KEEP):
        study_of(tmp_path).enqueue_trial({DW1: "keep_float", DW0: rule})
    _, evaluate, _ = run(tmp_path, trials=2)
    assert evaluate.scored == [
        str(fake.space(BUDGET).plan({DW1: "keep_float", DW0: "keep_float"}))
    ]
    _, evaluate, _ = run(tmp_path, trials=3)
    assert evaluate.scored == ["keep_float@dw1"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"nowhere": "keep_float"}, "enqueued nowhere=keep_float: no such choice in this search"),
        ({DW1: "merge"}, f"enqueued {DW1}=merge: keep, "),
    ],
)
def test_an_impossible_one_is_said_and_the_search_goes_on(
    tmp_path: Path, wanted: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, trials=3)
    study_of(tmp_path).enqueue_trial(wanted)
    with caplog.at_level(logging.WARNING):
        outcome, evaluate, _ = run(tmp_path, trials=5)
    assert said in caplog.text
    assert (outcome.plans, len(evaluate.scored)) == (5, 2)
    assert all(t.state.is_finished() for t in trials(tmp_path))


def test_what_goes_over_the_limits_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, trials=1)
    floats = {slot_with("keep_float", name): "keep_float" for name in ("dw0", "dw1", "stem")}
    study_of(tmp_path).enqueue_trial(floats)
    with caplog.at_level(logging.WARNING):
        _, evaluate, _ = run(tmp_path, trials=2)
    assert evaluate.scored == ["keep_float@dw0 keep_float@dw1"]
    assert "left out, above the limits or not together with the rest:" in caplog.text
    assert f"{slot_with('keep_float', 'stem')}=keep_float" in caplog.text


def test_a_kill_loses_none_of_them(tmp_path: Path) -> None:
    """Killed while the first is scored: both are scored by the next run, and nothing twice."""
    run(tmp_path, trials=2)
    study = study_of(tmp_path)
    study.enqueue_trial({DW1: "keep_float"})
    study.enqueue_trial({DW0: "merge_separable"})

    class Dying(fake.FakeEvaluator):
        def __call__(self, plan: Plan) -> Score:
            raise Killed

    # what a kill leaves: the trial running, its plan and another worker's entry in the queue
    trial = study.ask()
    trial.set_user_attr("worker", "gone")
    trial.set_user_attr("enqueued", True)
    trial.set_user_attr("plan", "keep_float@dw1")
    study.enqueue_trial({DW1: KEEP}, user_attrs={"plan": "", "worker": "gone"})
    with pytest.raises(Killed):
        run(tmp_path, trials=4, evaluate=Dying(Records(tmp_path, "f")))
    _, evaluate, _ = run(tmp_path, trials=4)
    assert sorted(evaluate.scored) == ["keep_float@dw1", "merge_separable@dw0"]
    assert all(t.state.is_finished() for t in trials(tmp_path))


def test_the_same_plan_enqueued_again_is_not_scored_twice(tmp_path: Path) -> None:
    run(tmp_path, trials=2)
    study_of(tmp_path).enqueue_trial({DW1: "keep_float"})
    _, _, records = run(tmp_path, trials=4)
    before = len(records)
    study_of(tmp_path).enqueue_trial({DW1: "keep_float"})
    outcome, evaluate, _ = run(tmp_path, trials=5)
    assert outcome.plans == 5
    assert "keep_float@dw1" not in evaluate.scored
    assert len(Records(tmp_path, "f")) == before + 1
