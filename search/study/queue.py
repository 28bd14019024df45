"""Take a plan out of the study's queue: one that this worker put there, or one that a user enqueued.

A user's entry is what Optuna's ``study.enqueue_trial`` leaves: choices for some slots, and no plan.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from rewriter.plan import Plan
from search.strategy.space import KEEP, Space

log = logging.getLogger(__name__)


def keeping(space: Space) -> BaseSampler:
    """A sampler that leaves every slot unchanged which an entry of the queue does not fix."""
    return PartialFixedSampler(dict.fromkeys(space.choices, KEEP), RandomSampler(seed=0))


def is_users(trial: FrozenTrial) -> bool:
    """Whether a user, not a worker, enqueued this trial."""
    return "plan" not in trial.user_attrs and bool(enqueued_choices(trial))


def enqueued_choices(trial: FrozenTrial) -> dict[str, Any]:
    """The choices that an entry of the queue asks for, by slot."""
    return dict(trial.system_attrs.get("fixed_params", {}))


def user_entries_wait(trials: Sequence[FrozenTrial]) -> bool:
    """Whether a user has enqueued something that no worker has taken yet."""
    return any(t.state == TrialState.WAITING and is_users(t) for t in trials)


def claim(
    study: optuna.Study, plan: Plan | None, space: Space, worker: str
) -> tuple[Trial, Plan] | None:
    """A running trial and what it is to score; None where there is nothing, or nothing valid.

    Args:
        study: Its sampler is that of `keeping`.
        plan: What to put in the queue first; None: take what a user has put there.
        space: What may be asked for.
        worker: Name of this worker.
    """
    choice = {} if plan is None else space.choice(plan) or {}
    entry = {"plan": str(plan), "worker": worker}
    if plan is not None:
        study.enqueue_trial(choice, user_attrs=entry)
    trial = study.ask()
    # A faster worker can take all that we saw waiting; Optuna then makes a trial of its own, which
    # asks for nothing. What that worker left in exchange for ours waits now.
    while "plan" not in trial.user_attrs and not enqueued_choices(_frozen(study, trial)):
        study.tell(trial, state=TrialState.FAIL)
        if plan is None:
            return None
        if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            study.enqueue_trial(choice, user_attrs=entry)
        trial = study.ask()
    # Another worker may have popped our entry of the queue and left us its own: the trial says
    # what to score.
    if trial.user_attrs.get("worker") != worker:
        trial.set_user_attr("worker", worker)
    if "plan" not in trial.user_attrs and not _accept(study, trial, space):
        return None
    for slot, rules in space.choices.items():
        trial.suggest_categorical(slot, rules)
    return trial, Plan.parse(trial.user_attrs["plan"])


def give_back(study: optuna.Study, number: int) -> None:
    """End a trial that was not scored; what a user had enqueued goes back to the queue."""
    trial = study.get_trials(deepcopy=False)[number]
    if "enqueued" in trial.user_attrs:
        study.enqueue_trial(enqueued_choices(trial))
    study.tell(number, state=TrialState.FAIL)


def _accept(study: optuna.Study, trial: Trial, space: Space) -> bool:
    """Write the plan of a user's entry into its trial.

    An infeasible request fails the trial and is logged; the result is then False.
    """
    wanted = enqueued_choices(_frozen(study, trial))
    for slot, rule in wanted.items():
        if rule not in space.choices.get(slot, ()):
            known = ", ".join(space.choices.get(slot, ())) or "no such choice in this search"
            log.warning("trial %d: enqueued %s=%s: %s", trial.number, slot, rule, known)
            study.tell(trial, state=TrialState.FAIL)
            return False
    plan = space.plan(wanted)
    left = [f"{s}={r}" for s, r in wanted.items() if r != KEEP and space.choice(plan)[s] == KEEP]  # type: ignore[index]
    if left:
        log.warning(
            "trial %d: left out, above the limits or not together with the rest: %s",
            trial.number,
            ", ".join(left),
        )
    trial.set_user_attr("enqueued", True)  # enqueued again if this worker dies
    trial.set_user_attr("plan", str(plan))
    return True


def _frozen(study: optuna.Study, trial: Trial) -> FrozenTrial:
    return study.get_trials(deepcopy=False)[trial.number]
