"""The steps of a run: analyse, lay out the space, try what is promising, search."""

from __future__ import annotations

import hashlib
import logging
import math
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx

from rewriter import Plan, Step, find_sites
from rewriter.graph import layers
from rewriter.ladder import REMEDIES
from search.analysis import Sensitivity, analyze, read_sensitivity
from search.config import Config, load_config
from search.evaluator import extra_macs
from search.job import Job, Progress, Told, open_job, silent
from search.records import Score, note
from search.rungs import rungs, start
from search.space import (
    KEEP_FLOAT,
    Budget,
    Space,
    make_space,
    predicted_front,
    reference_plans,
    single_plans,
)
from search.storage import storage_at
from search.study import Outcome, Settings, search

log = logging.getLogger(__name__)

LEAST_LEFT = 0.02  # no step is trusted to take away more than 98 % of the damage


def sensitivity_of(job: Job, progress: Progress = silent, *, exact: bool = False) -> Sensitivity:
    """The analysis of a run: the one in its directory, or a new one."""
    known = read_sensitivity(job.folder, job.records.fingerprint, exact=exact)
    if known is not None:
        return known
    with progress("ranking the layers") as tick:
        return analyze(job.evaluator, job.folder, exact=exact, tick=tick)


def note_run(job: Job, storage: str | None = None) -> None:
    """Write what readers of the run directory and further workers need."""
    budget = budget_of(job)
    note(
        job.folder,
        baseline=asdict(job.evaluator.baseline()),
        objective=job.objective,
        limits={"macs": budget.macs, "float_layers": budget.float_layers},
        options=job.cfg.search.model_dump(),
        storage=storage,
    )


def budget_of(job: Job) -> Budget:
    """The limits of the config; by default 1 layer in 20, at least 1, may stay in float."""
    limit = job.cfg.search.max_float_layers
    if limit is None:
        limit = max(1, len(layers(job.gm)) // 20)
    macs = job.evaluator.baseline().macs
    return Budget(macs=job.cfg.search.max_macs * macs, float_layers=limit)


def space_of(job: Job, sensitivity: Sensitivity) -> Space:
    """The search space of a run."""
    macs = job.evaluator.baseline().macs

    def price(step: Step) -> int | None:
        return extra_macs(job.gm, [Plan((step,))]).get(str(step))

    damage = sensitivity.damage_by_node()
    return make_space(find_sites(job.gm), damage, price, macs, budget_of(job))


def worth_trying(
    gm: fx.GraphModule, space: Space, sensitivity: Sensitivity, trials: int
) -> Callable[[Mapping[str, Score]], list[Plan]]:
    """What to score first, before any search.

    References, the ladder of free remedies, each answer on top of its best rung, then what these
    predict to be best.

    A step is taken to multiply the damage by the factor that it has alone: so the prediction never
    falls below zero, and the logarithm is additive. A layer in float that was not scored takes
    away the share of the damage that it does alone.

    Args:
        gm: Profiled canonical graph.
        space: Choices and costs.
        sensitivity: Damage of each layer.
        trials: Plans that will be scored in all; a third of them are single answers.
    """
    first = reference_plans([d.node for d in sensitivity.layers], space)
    singles = [p for p in single_plans(space, max(6, trials // 3)) if not _of_the_ladder(p)]
    alone = {Step(KEEP_FLOAT, d.node): d.damage for d in sensitivity.layers}

    def worth(scores: Mapping[str, Score]) -> list[Plan]:
        ladder = rungs(gm, scores)
        if isinstance(ladder, Plan):
            return list(dict.fromkeys([*first, *_below(gm, scores), ladder]))
        base = start(ladder)
        plans = [*first, *(r.plan for r in ladder if not r.note), *_on_top(space, base, singles)]
        empty, bottom = scores.get(""), scores.get(str(base))
        if any(str(p) not in scores for p in plans):
            return plans
        if empty is None or not empty.damage or bottom is None or not bottom.damage:
            return plans
        gain: dict[Step, float] = {}
        for step in space.steps():
            score = scores.get(str(space.repair([*base.steps, step])))
            if step in base.steps:
                continue
            if score is not None and score.damage is not None:
                left = score.damage / bottom.damage
            else:
                left = 1 - alone.get(step, 0.0) / empty.damage
            gain[step] = -math.log(max(left, LEAST_LEFT))
        found = predicted_front(space, gain, math.log(bottom.damage))
        return plans + _on_top(space, base, [plan for plan, _ in found])

    return worth


def _of_the_ladder(plan: Plan) -> bool:
    return all(step.rule in dict(REMEDIES).values() for step in plan.steps)


def _below(gm: fx.GraphModule, scores: Mapping[str, Score]) -> list[Plan]:
    """The rungs that are scored already, in the order in which they were climbed."""
    known: list[Plan] = []
    while isinstance(following := rungs(gm, {str(p): scores[str(p)] for p in known}), Plan):
        if str(following) not in scores:
            break
        known.append(following)
    return known


def _on_top(space: Space, base: Plan, plans: Iterable[Plan]) -> list[Plan]:
    """Each plan together with the steps of ``base``."""
    return list(dict.fromkeys(space.repair([*base.steps, *p.steps]) for p in plans))


def run_search(
    job: Job,
    sensitivity: Sensitivity,
    storage: str | None = None,
    told: Told = lambda score, count: None,
    max_drop: float | None = None,
) -> Outcome:
    """Search until the config's budget is used up; the same call again goes on from there.

    Args:
        job: What to search.
        sensitivity: Its analysis.
        storage: URL of a shared Optuna storage; None: a journal in the run directory.
        told: Called after each plan.
        max_drop: Points of the metric; a plan that loses no more, adds no MACs and keeps no layer
            in float ends the search, since no plan that meets the goal is cheaper.
    """
    space = space_of(job, sensitivity)
    if space.dropped:
        damage = sensitivity.damage_by_node()
        log.warning(
            "%d places are not searched: the damage of each is at most %.2g",
            len(space.dropped),
            max(damage.get(anchor, 0.0) for anchor in space.dropped),
        )
    options = job.cfg.search
    settings = Settings(
        name=_study_name(job, space),
        trials=options.trials,
        timeout_s=options.timeout,
        seed=options.seed,
        objective=job.objective,
        higher_is_better=job.evaluator.task.higher_is_better,
    )
    place = storage_at(storage or str(job.folder / "journal.log"))
    worth = worth_trying(job.gm, space, sensitivity, options.trials)
    enough = _meets(job, max_drop)
    return search(job.evaluator, job.records, space, worth, settings, place, told, enough)


def _meets(job: Job, max_drop: float | None) -> Callable[[Score], bool]:
    baseline = job.evaluator.baseline()
    if max_drop is None or baseline.float is None:
        return lambda score: False
    sign = 1.0 if job.evaluator.task.higher_is_better else -1.0
    least = sign * baseline.float - max_drop / 100
    return lambda score: (
        score.metric is not None
        and sign * score.metric >= least
        and score.macs <= baseline.macs
        and score.float_layers == 0
    )


@contextmanager
def helpers(cfg: Config, folder: Path, storage: str | None) -> Generator[None]:
    """The config's other worker processes beside this one; they end with the search."""
    context = multiprocessing.get_context("spawn")
    options = cfg.search.model_dump()
    share = max(1, (os.cpu_count() or 1) // cfg.search.workers)
    started = [
        context.Process(target=work, args=(cfg.path, folder, options, storage, share), daemon=True)
        for _ in range(cfg.search.workers - 1)
    ]
    for process in started:
        process.start()
    try:
        yield
        for process in started:
            process.join()
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
                process.join(10)


def work(
    path: Path,
    folder: Path,
    options: Mapping[str, Any],
    storage: str | None = None,
    threads: int = 1,
    told: Told = lambda score, count: None,
) -> Outcome:
    """Be one more worker of a run whose analysis is done."""
    torch.set_num_threads(threads)
    cfg = with_options(load_config(path), **options)
    job = open_job(cfg, folder, threads=threads)
    return run_search(job, sensitivity_of(job), storage, told)


def with_options(cfg: Config, **options: Any) -> Config:
    """The config with some of its ``search`` keys replaced; None leaves a key as it is."""
    given = {key: value for key, value in options.items() if value is not None}
    changed = cfg.search.model_validate({**cfg.search.model_dump(), **given})
    return cfg.model_copy(update={"search": changed}).read_from(cfg.path)


def _study_name(job: Job, space: Space) -> str:
    """One study per space, objective and seed: a changed space would not fit the old trials."""
    text = repr(
        (
            job.records.fingerprint,
            sorted(space.choices.items()),
            space.budget,
            job.objective,
            job.cfg.search.seed,
        )
    )
    return f"{job.cfg.path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
