"""What TPE proposes: a few changes of a plan that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rewriter.plan import Plan
from search.pareto.front import pareto
from search.strategy.space import KEEP, Space

Direction = StudyDirection | Literal["minimize", "maximize"]

ATTEMPTS = 24
ENUMERABLE = 20_000
CHANGED = 4  # slots in which a proposal differs from a good plan, on average


def propose(
    space: Space,
    trials: Sequence[FrozenTrial],
    seen: set[str],
    directions: Sequence[Direction],
    seed: int,
) -> Plan | None:
    """A plan that nobody has tried: from TPE, else a random one, else None.

    TPE's prior gives each slot its share of change, so that in a space of dozens of slots a sample
    would differ from every good plan in a third of them. Of a sample, therefore, only a few slots
    are taken; the others are those of a plan on the front.

    TPE works on a copy of the study in memory, in which proposals that are known already leave no
    trace. Trials that other workers have claimed are in the copy as running, and so repel it
    (constant liar).

    Source: Watanabe 2023, Tree-structured Parzen estimator, arXiv:2304.11127.
    """
    distributions = distributions_of(space)
    if not distributions:
        return None if "" in seen else Plan(())
    running = [t for t in trials if t.state == TrialState.RUNNING and t.params]
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.params]
    # Optuna ranks a pruned trial without a value behind all complete ones: never as if it had been
    # scored in full, and never forgotten.
    stopped = [t for t in trials if t.state == TrialState.PRUNED and t.params]
    sampler = TPESampler(
        multivariate=True, seed=seed, n_startup_trials=5, constant_liar=bool(running)
    )
    copy = optuna.create_study(directions=list(directions), sampler=sampler)
    copy.add_trials(done + stopped + running)
    random = np.random.default_rng(seed)
    parents = _parents(done, directions) or [dict.fromkeys(space.choices, KEEP)]
    share = min(1.0, CHANGED / len(distributions))
    for _ in range(ATTEMPTS):
        trial = copy.ask(distributions)
        parent = parents[random.integers(len(parents))]
        taken = {slot: v for slot, v in trial.params.items() if random.random() < share}
        plan = space.plan({**parent, **taken})
        if str(plan) not in seen:
            return plan
        copy.tell(trial, state=TrialState.FAIL)

    everything = space.all_plans(ENUMERABLE)
    if everything is not None:
        unseen = [p for p in everything if str(p) not in seen]
        return unseen[random.integers(len(unseen))] if unseen else None
    for _ in range(1000):
        choice = dict(parents[random.integers(len(parents))])
        for slot in random.choice(list(space.choices), CHANGED, replace=True).tolist():
            choice[slot] = str(random.choice(space.choices[slot]))
        plan = space.plan(choice)
        if str(plan) not in seen:
            return plan
    return None


def _parents(done: Sequence[FrozenTrial], directions: Sequence[Direction]) -> list[dict[str, str]]:
    """Choices of the feasible trials that no other beats."""
    feasible = [t for t in done if all(v <= 0 for v in t.constraints.values())]
    up = directions[1] == "maximize"
    macs = np.array([t.values[0] for t in feasible])
    value = np.array([t.values[1] if up else -t.values[1] for t in feasible])
    return [dict(feasible[i].params) for i in pareto(macs, value).tolist()]


def distributions_of(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's name for the choices of each slot."""
    return {slot: CategoricalDistribution(rules) for slot, rules in space.choices.items()}
