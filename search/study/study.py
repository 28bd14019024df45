"""The search: an Optuna study in which no plan is scored twice and no kill loses anything.

One loop, the same for one worker or many: take what a user has enqueued, else the first plan that
is worth trying and not yet known, else let TPE propose one; claim it as a running trial; score it;
tell. The next proposal depends only on the seed and on what has been scored, so a run that was
interrupted and resumed goes the way of one that was not.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from rewriter.plan import Plan
from search.pareto.front import Cost, cost_named
from search.pareto.limits import Limits
from search.pareto.plan_summary import plan_summary
from search.run_dir.scores import Records, Score
from search.strategy.schedule import Worth
from search.strategy.space import Space, in_float
from search.strategy.tpe import Direction, propose
from search.study.queue import claim, give_back, keeping, user_entries_wait
from search.study.storage import recover, working

log = logging.getLogger(__name__)

# The filters of warnings belong to the process: threads that change them at once undo each other's.
_SETTING_UP = threading.Lock()

Evaluator = Callable[[Plan], Score]
"""Plans worth trying before any search, best first, given the scores by plan text so far."""

REFUSALS = 500
FAILED, CLAIMED, STOPPED = TrialState.FAIL, TrialState.RUNNING, TrialState.PRUNED
SHOWN = (
    "macs",
    "params",
    "weight_bytes",
    "latency_ms",
    "metric",
    "damage",
    "engine",
    "interval",
    "metric_float",
    "float_layers",
    "float_islands",
    "samples",
    "stopped",
    "error",
)


@dataclass(frozen=True)
class Settings:
    """How long and for what to search.

    Attributes:
        name: Name of the study in its storage; one per model, data, target and space.
        trials: Plans to score in all, counting those of earlier runs of the same study.
        timeout_s: Seconds after which no new plan is begun.
        objective: ``metric``, or ``damage`` where there are no labels.
        cost: What stands against it: ``macs`` or ``latency``.
        limits: What a plan must meet to count as feasible.
        admits: Says of a plan whether it can meet the limits; one that cannot is not proposed.
        again: Says of a score that its plan is to be scored once more, before all others.
        elsewhere_s: Seconds for which a trial is left to a worker of another run directory, of which it
            cannot be seen here whether it lives. None: there are no such workers.
    """

    name: str
    trials: int = 100
    timeout_s: float | None = None
    seed: int = 0
    objective: Literal["metric", "damage"] = "metric"
    higher_is_better: bool = True
    cost: Cost = "macs"
    limits: Limits = field(default_factory=Limits)
    admits: Callable[[Plan], bool] = lambda plan: True
    again: Callable[[Score], bool] = lambda score: False
    elsewhere_s: float | None = None

    def directions(self) -> list[Direction]:
        up = self.objective == "metric" and self.higher_is_better
        return ["minimize", "maximize" if up else "minimize"]

    def values(self, score: Score) -> tuple[float, float] | None:
        value = score.metric if self.objective == "metric" else score.damage
        if score.error is not None or score.stopped or value is None:
            return None
        return cost_named(self.cost)(score), value


@dataclass(frozen=True)
class Outcome:
    """Why a search ended, and how many plans it has scored; ``exhausted``: every plan there is."""

    reason: Literal["trials", "timeout", "exhausted", "goal"]
    plans: int


def search(
    evaluate: Evaluator,
    records: Records,
    space: Space,
    worth: Worth,
    settings: Settings,
    storage: BaseStorage,
    on_score: Callable[[Score, int], None] = lambda score, count: None,
    enough: Callable[[Score], bool] = lambda score: False,
) -> Outcome:
    """Score plans until budget, time or space is used up; the same call again goes on.

    Args:
        evaluate: Gives the score of a plan and stores it in `records`; a plan that cannot be
            scored is a score with an error. What it raises ends the search, with nothing lost.
        records: Scores known already; a plan found there is not scored again.
        space: What may be proposed.
        worth: What to try first.
        settings: Budget, seed and objective.
        storage: Where the study is; workers that share it share the search.
        on_score: Called after each plan with its score and the number of plans scored in all.
        enough: Says of a score, of whatever worker, that no other plan needs to be scored.
    """
    began = time.monotonic()
    judged: set[str] = set()
    with _quiet_optuna(), working(records.folder / "workers") as worker:
        with _SETTING_UP, warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                study_name=settings.name,
                storage=storage,
                directions=settings.directions(),
                sampler=keeping(space),
                load_if_exists=True,
            )
            study.set_metric_names(
                [settings.cost, settings.objective]
            )  # what optuna-dashboard writes on the axes
        recover(study, records.folder / "workers", worker, settings.elsewhere_s)
        while True:
            records.refresh()
            trials = study.get_trials(deepcopy=False)
            again = [s.plan for s in records.scores() if settings.again(s)]
            ended = _ended(trials, again)
            claimed = {t.user_attrs.get("plan", "?") for t in trials if t.state == CLAIMED}
            count = sum(ended.values())
            new = [s for s in records.scores() if s.plan in ended and s.plan not in judged]
            judged.update(s.plan for s in new)
            if any(enough(score) for score in new):
                return Outcome("goal", count)
            if count + len(claimed) >= settings.trials:
                return Outcome("trials", count)
            if settings.timeout_s is not None and time.monotonic() - began >= settings.timeout_s:
                return Outcome("timeout", count)
            seed = _seed(settings.seed, len(ended), len(claimed))
            # Only of trials that have ended: a score whose trial was killed before it was told, or
            # one from elsewhere, must not change which plan comes next.
            scores = {s.plan: s for s in records.scores() if s.plan in ended}
            plan: Plan | None = None
            if not user_entries_wait(trials):
                waiting = [Plan.parse(text) for text in again if text not in claimed]
                plan = next(iter(waiting), None) or _next(
                    space, worth, scores, trials, claimed | set(ended), settings, seed
                )
                if plan is None:
                    return Outcome("exhausted", count)
            tried = _try(study, plan, evaluate, records, space, settings, worker)
            if tried is not None:
                score, counts = tried
                on_score(score, count + counts)


def _next(
    space: Space,
    worth: Worth,
    scores: Mapping[str, Score],
    trials: Sequence[FrozenTrial],
    seen: set[str],
    settings: Settings,
    seed: int,
) -> Plan | None:
    """The plan to try next, None where all are known."""
    for plan in worth(scores):
        if str(plan) not in seen and space.choice(plan) is not None:
            return plan
    refused: set[str] = set()
    directions = settings.directions()
    while (plan := propose(space, trials, seen | refused, directions, seed)) is not None:
        if settings.admits(plan):
            return plan
        refused.add(str(plan))
        if len(refused) >= REFUSALS:
            log.warning("%d proposals in a row cannot meet the limits", len(refused))
            return None
    return None


def _try(
    study: optuna.Study,
    plan: Plan | None,
    evaluate: Evaluator,
    records: Records,
    space: Space,
    settings: Settings,
    worker: str,
) -> tuple[Score, bool] | None:
    """Claim a plan, or what a user has enqueued where it is None; score it and tell.

    Returns:
        The score and whether it counts, None where another worker was faster or the plan is none.
    """
    taken = claim(study, plan, space, worker)
    if taken is None:
        return None
    trial, plan = taken
    text = str(plan)
    everyone = study.get_trials(deepcopy=False)
    others = [t for t in everyone if t.user_attrs.get("plan") == text]
    before = [t for t in everyone if t.number < trial.number]
    records.refresh()
    ended = _ended(before, [s.plan for s in records.scores() if settings.again(s)])
    claimed = [t.user_attrs.get("plan") for t in before if t.state == CLAIMED]
    if text in ended or text in claimed:
        study.tell(trial, state=FAILED)
        return None
    # Two workers may have seen the same last place in the budget: the first trial has it.
    if sum(ended.values()) + len(claimed) >= settings.trials:
        give_back(study, trial.number)
        return None
    # First of all: a trial without a constraint counts as feasible, whatever becomes of it.
    if space.budget.macs is not None:
        trial.set_constraint("max_macs", space.predicted_macs(plan) - space.budget.macs)
    if space.budget.float_layers is not None:
        floats = sum(map(in_float, plan.steps))
        trial.set_constraint("max_float_layers", floats - space.budget.float_layers)
    # A plan that a killed run of this study scored and could not tell any more counts; one from
    # elsewhere is free.
    ours = any(t.number != trial.number for t in others)
    # So does the empty plan, which every run scores before it searches.
    free = bool(text) and text in records and not ours
    try:
        score = evaluate(plan)
    except BaseException:
        with suppress(OSError):  # a full disk takes nothing; the next run ends the trial
            give_back(study, trial.number)
        raise
    trial.set_user_attr("summary", plan_summary(score.plan))
    for name in SHOWN:
        trial.set_user_attr(name, getattr(score, name))
    known = study.get_trials(deepcopy=False)[trial.number].constraints
    for name, excess in settings.limits.excess(score).items():
        if name not in known:
            trial.set_constraint(name, excess)
    trial.set_user_attr("counts", not free)
    values = settings.values(score)
    if values is None:
        study.tell(trial, state=STOPPED if score.stopped else FAILED)
    else:
        study.tell(trial, values)
    log.info(
        "plan %r: macs %d, metric %s, damage %s, %s",
        text,
        score.macs,
        score.metric,
        score.damage,
        score.engine,
    )
    return score, not free


def _ended(trials: Sequence[FrozenTrial], again: Sequence[str]) -> dict[str, bool]:
    """The plans that were scored, but for those to be scored again, and whether each counts."""
    found: dict[str, bool] = {}
    for t in trials:
        if _has_score(t) and t.user_attrs["plan"] not in again:
            plan = t.user_attrs["plan"]
            found[plan] = found.get(plan, False) or t.user_attrs["counts"]
    return found


def _has_score(trial: FrozenTrial) -> bool:
    """Whether the trial ended with a score, good or failed."""
    return (
        trial.state.is_finished() and "counts" in trial.user_attrs and "plan" in trial.user_attrs
    )


@contextmanager
def _quiet_optuna() -> Generator[None]:
    """Optuna announces every study, and each proposal makes one in memory."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence([p & 0xFFFFFFFF for p in parts]).generate_state(1)[0])
