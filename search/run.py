"""The steps of a run: analyse, lay out the space, try what is promising, search, alone or with helpers."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rewriter import Plan, Step, find_sites
from rewriter.graph import layers
from search.analysis import Sensitivity, analyze, read_sensitivity
from search.config import Config, load_config
from search.evaluator import extra_macs
from search.job import Job, Progress, Told, open_job, silent
from search.records import Score, note
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
    """The limits of the config; by default one layer in twenty may stay in float, and one always may."""
    limit = job.cfg.search.max_float_layers
    if limit is None:
        limit = max(1, len(layers(job.gm)) // 20)
    macs = job.evaluator.baseline().macs
    return Budget(macs=job.cfg.search.max_macs * macs, float_layers=limit)


def space_of(job: Job, sensitivity: Sensitivity) -> Space:
    """The search space of a run."""
    sites = find_sites(job.gm)
    steps = [Step(s.rule, s.nodes[0]) for s in sites if not s.blocked]
    added = extra_macs(job.gm, [Plan((step,)) for step in steps])
    known = {step: added[str(step)] for step in steps if str(step) in added}
    usable = [s for s in sites if not s.blocked and Step(s.rule, s.nodes[0]) in known]
    baseline = job.evaluator.baseline()
    return make_space(usable, sensitivity.damage_by_node(), known, baseline.macs, budget_of(job))


def worth_trying(
    space: Space, sensitivity: Sensitivity
) -> Callable[[Mapping[str, Score]], list[Plan]]:
    """What to score before any search: references, each answer alone, then what these predict to be best."""
    first = reference_plans([d.node for d in sensitivity.layers], space)
    singles = single_plans(space)
    alone = {Step(KEEP_FLOAT, d.node): d.damage for d in sensitivity.layers}

    def worth(scores: Mapping[str, Score]) -> list[Plan]:
        plans = [*first, *singles]
        empty = scores.get("")
        if empty is None or empty.damage is None or any(str(p) not in scores for p in plans):
            return plans
        gain = dict(alone)
        for step in space.steps():
            score = scores.get(str(step))
            if score is not None:
                gain[step] = -1.0 if score.damage is None else empty.damage - score.damage
        known = {step: g for step, g in gain.items() if step in space.nodes}
        return plans + [plan for plan, _ in predicted_front(space, known, empty.damage)]

    return worth


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
        log.warning(
            "%d of %d anchors searched: the damage of the others is at most %.2g",
            len(space.choices), len(space.choices) + len(space.dropped),
            max((sensitivity.damage_by_node().get(a, 0.0) for a in space.dropped), default=0.0),
        )  # fmt: skip
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
    worth = worth_trying(space, sensitivity)
    enough = _meets(job, max_drop)
    return search(job.evaluator, job.records, space, worth, settings, place, told, enough)


def _meets(job: Job, max_drop: float | None) -> Callable[[Score], bool]:
    baseline = job.evaluator.baseline()
    if max_drop is None or baseline.float is None:
        return lambda score: False
    sign = 1.0 if job.evaluator.task.higher_is_better else -1.0
    least = sign * baseline.float - max_drop / 100
    return lambda score: (
        score.metric is not None and sign * score.metric >= least
        and score.macs <= baseline.macs and score.float_layers == 0
    )  # fmt: skip


@contextmanager
def helpers(cfg: Config, folder: Path, storage: str | None) -> Generator[None]:
    """Further worker processes of a run, as many as the config asks for beside this one; they end with the search."""
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
    path: Path, folder: Path, options: Mapping[str, Any], storage: str | None = None, threads: int = 1,
    told: Told = lambda score, count: None,
) -> Outcome:  # fmt: skip
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
    text = repr((
        job.records.fingerprint, sorted(space.choices.items()), space.budget, job.objective, job.cfg.search.seed,
    ))  # fmt: skip
    return f"{job.cfg.path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
