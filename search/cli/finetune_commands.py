"""The parts of the command line that train: ``run --finetune``, ``table``, and ``export`` of what was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import rich.table

from rewriter import Plan
from search.cli.console import out, progress, say
from search.cli.options import Plans
from search.config.schema import Config, load_config
from search.finetune.block_table import Table, make_table
from search.finetune.run import Finetuner, finetune
from search.job import Job, open_job
from search.report import write_report
from search.report.rows import percent
from search.results import Results, load_results, write_front
from search.run import note_run, with_options
from search.run_dir.scores import Score


def with_training(cfg: Config, plans: Plans | None) -> Config:
    """The config with the plans to train that the command line asks for."""
    if plans is None:
        return cfg
    settings = cfg.finetune.model_copy(update={"plans": plans.value})
    return cfg.model_copy(update={"finetune": settings}).read_from(cfg.path)


def train_chosen(job: Job, results: Results, quiet: bool) -> Results:
    """Train what the config asks for; the front is then written again, with what came out."""
    which = job.cfg.finetune.plans
    if which == "none" or not results.front.points:
        return results
    chosen = list(results.front.points) if which == "all-front" else [results.picked(which)]
    try:
        finetune(job, [Plan.parse(s.plan) for s in chosen], progress(quiet))
    finally:
        job.records.refresh()
        results = load_results(job.folder)
        write_front(results)
        write_report(results)
    return results


def as_trained(job: Job, results: Results, score: Score, quiet: bool) -> tuple[Job, Score]:
    """The job and score of a plan with its trained weights, where it was trained."""
    found = results.finetuned.get(score.plan)
    if found is None or found.after.error is not None:
        return job, score
    options = job.cfg.finetune.model_validate(found.recipe)
    tuner = Finetuner(job, options)
    with progress(quiet)("fine-tuned weights") as tick:
        tuner.network(Plan.parse(score.plan), tick)
    if not quiet:
        say(f"with the fine-tuned weights ({options.loss}); --untrained leaves them out")
    return replace(job, evaluator=tuner.evaluator), found.after


def table(
    config: Path, out_dir: Path | None, steps: int | None, quiet: bool, seed: int | None
) -> None:
    """What replacing only the first depthwise separable convolution is worth."""
    cfg = with_options(load_config(config), seed=seed)
    if steps is not None:
        settings = cfg.finetune.model_validate({**cfg.finetune.model_dump(), "steps": steps})
        cfg = cfg.model_copy(update={"finetune": settings}).read_from(cfg.path)
    bars = progress(quiet)
    job = open_job(cfg, out_dir or Path("runs") / cfg.path.stem, bars)
    note_run(job)
    made = make_table(job, bars)
    if quiet:
        return
    out.print(_shown(job, made))
    for reason in made.left_out:
        say(f"left out: {reason}")
    say(f"written: {job.folder / 'table.json'}")


def _shown(job: Job, made: Table) -> rich.table.Table:
    metric, count = job.evaluator.task.metric, job.evaluator.samples.count
    title = (
        f"{made.step} on {job.cfg.target}: {metric}, {count} samples, {job.evaluator.engine}; "
        "relative: to float = 100"
    )
    shown = rich.table.Table(title=title, title_justify="left", title_style="bold")
    for name in (
        "",
        "float",
        "int8",
        "95 % interval",
        "damage",
        "relative: float",
        "int8",
        "MACs",
    ):
        shown.add_column(name, justify="right" if name else "left", min_width=0 if name else 31)
    for row in made.rows:
        s = row.score
        cells: list[Any] = [row.name, percent(s.metric_float), s.error or percent(s.metric)]
        cells += ["" if s.interval is None else f"{s.interval[0]:.2%} to {s.interval[1]:.2%}"]
        cells += ["" if s.damage is None else f"{s.damage:.4g}"]
        cells += [_tenth(made.relative(s.metric_float)), _tenth(made.relative(s.metric))]
        shown.add_row(*cells, _tenth(100 * s.macs_ratio))
    return shown


def _tenth(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
