"""The whole of a run, once its job is open: analyze, search, confirm, report; and the cheapest plan that meets a goal.

The command line and `quantfix`, the package for Python, are both thin layers on this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from search.config.schema import ConfigError
from search.job import Job, Progress, silent
from search.report.finish import reported
from search.results import Results, load_results
from search.run import Goal, cheapest, confirm_front, note_run, run_search, sensitivity_of
from search.run_dir.scores import Score
from search.sensitivity.run import Sensitivity
from search.study.trackers import tracked
from search.workers.processes import helpers
from search.workers.ray import search_on_ray


def optimize(
    job: Job,
    progress: Progress = silent,
    *,
    storage: str | None = None,
    goal: Goal | None = None,
    ray: str | None = None,
    analyzed: Callable[[Sensitivity], None] = lambda sensitivity: None,
) -> Results:
    """Analyze and search; whatever ends it, the front of what is scored is on disk.

    Args:
        job: An open run; where it was begun before, it goes on.
        progress: Shows how far it is.
        storage: URL of a shared Optuna storage; None: a journal in the run directory.
        goal: What is good enough to end the search.
        ray: Address of a Ray cluster on which the workers run; None: here.
        analyzed: Called with the analysis before the search.

    Raises:
        ConfigError: the goal is a drop of the metric, and there are no labels; or the user's code fails.
    """
    if goal and goal.max_drop is not None and job.evaluator.samples.targets is None:
        raise ConfigError(
            "fix: the evaluation data have no labels, so a drop cannot be measured: give "
            "--max-damage instead, such as half of what plain int8 does (quantfix analyze)"
        )
    sensitivity = sensitivity_of(job, progress)
    note_run(job, storage, goal)
    analyzed(sensitivity)
    with reported(job, progress):
        if ray is not None:
            with progress("scoring plans") as tick:
                search_on_ray(job, storage, ray, tick)
        else:
            _search(job, sensitivity, progress, storage, goal)
        confirm_front(job, progress)
    return load_results(job.folder)


def _search(
    job: Job, sensitivity: Sensitivity, progress: Progress, storage: str | None, goal: Goal | None
) -> None:
    """Search beside the other worker processes that the config asks for."""
    trials = job.cfg.search.trials
    watched = tracked(job.cfg.search.trackers, job.folder, job.folder.name)
    with (
        watched as track,
        helpers(job, storage, goal) as threads,
        progress("scoring plans") as tick,
    ):

        def told(score: Score, count: int) -> None:
            track(score, count)
            tick(count, trials)

        own = replace(job, evaluator=replace(job.evaluator, threads=threads))
        run_search(own, sensitivity, storage, told, goal)


def fixed(job: Job, results: Results, goal: Goal) -> tuple[Score, bool]:
    """The cheapest plan that meets a goal within the config's MACs and true, else the best one and false."""
    chosen = cheapest(job, goal, job.cfg.search.most_macs)
    return (results.best(), False) if chosen is None else (chosen, True)
