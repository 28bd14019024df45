"""What the commands do, once their arguments are read; `search.cli.main` imports this when one is carried out."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import typer

from rewriter import Plan, cost, find_sites
from rewriter.damage import fidelity_of
from rewriter.graph import facts
from search.cli.console import err, out, progress, say
from search.cli.finetune_commands import as_trained, train_chosen, with_training
from search.cli.from_model import MAX_DAMAGE, MODEL_FILES, config_of_model
from search.cli.options import Plans
from search.cli.summary import show_results
from search.cli.tables import clock_table, forms_table, sensitivity_table, sites_table
from search.config.schema import Config, ConfigError, load_config
from search.data.datasets import batches
from search.export.forms import checked_forms, export_forms
from search.export.ship import ship
from search.export.trained import with_weights
from search.job import IN_MEMORY, Job, Network, float_metric, load_network, open_job
from search.optimize import fixed, optimize
from search.report import write_report
from search.report.file_facts import told_of_float
from search.report.finish import draw
from search.report.rows import loss_said
from search.report.sensitivity_svg import write_sensitivity_svg
from search.report.verdict import words
from search.results import Results, load_results, write_front
from search.run import (
    Goal,
    noted_goal,
    sensitivity_of,
    with_options,
)
from search.run_dir.files import RunError
from search.run_dir.scores import Score, read_run
from search.sensitivity.calibration_set import calibration_set
from search.sensitivity.run import Sensitivity
from search.workers.processes import work

GOAL_NOT_MET = 1
CHECKED = 256  # images of each set that ``check`` compares


def check(config: Path, quiet: bool = False) -> None:
    """Load, trace and run the float network; say what it costs and what is wrong. Changes nothing."""
    cfg = load_config(config)
    network = load_network(cfg, progress(quiet))
    gm, data = network.gm, network.data
    spent, found = cost(gm), find_sites(gm)
    near = sum(bool(s.blocked) for s in found)
    rows = [
        ("config", str(cfg.path)),
        ("network", f"{type(gm).__name__}, inputs {', '.join(map(str, facts.EXAMPLE.of(gm)))}"),
        ("cost", f"{spent.macs / 1e6:.2f} M MACs, {spent.params / 1e6:.3f} M parameters"),
        ("", "convolutions, linear layers, matrix products; batch norm is not counted"),
        ("samples", f"{len(data.calibration)} calibration, {len(data.evaluation)} evaluation"),
        ("target", cfg.target),
        ("float", float_metric(network)),
        ("sites", f"{len(found) - near}, and {near} near misses (quantfix sites)"),
        *_file_facts(cfg, network),
        *_calibration_facts(network),
    ]
    rows += [("output", line) for line in fidelity_of(gm).about]
    rows += [
        ("opaque", f"{part.name} ({part.kind}): {part.reason} {part.line}")
        for part in facts.OPAQUE.of(gm)
    ]
    for name, fact in [] if quiet else rows:
        say(f"{name:>10}  {fact}")


def _calibration_facts(network: Network) -> list[tuple[str, str]]:
    """Whether the calibration set covers what evaluation needs."""
    pairs = batches(network.data.evaluation, 32)
    inputs = (b[0] if isinstance(b, tuple) else b for b in islice(pairs, CHECKED // 32))
    calibration, left = list[Any](), CHECKED
    for batch in network.calibration:
        calibration += [batch[:left]] if left > 0 else []
        left -= len(batch)
    found = calibration_set(network.gm, calibration, inputs)
    rows = [("ranges", line) for line in found.lines()]
    return rows + [("warning", line) for line in found.warnings()]


def _file_facts(cfg: Config, network: Network) -> list[tuple[str, str]]:
    """What the file of plain int8 computes in int8, and what not."""
    engine, done = network.engine, network.file
    share, wanted = done.int8_share, cfg.search.min_int8_share
    facts = [("int8", f"{share:.1%} of the MACs in int8 kernels ({engine.name})")]
    reasons = {layer.layer: layer.reason for layer in done.float_layers}
    if reasons or done.float_ops:
        facts.append(("in float", told_of_float(reasons, done.float_ops)))
    if share < wanted:
        facts.append(("warning", f"less than {wanted:.0%} (search.min_int8_share)"))
    return facts


def analyze(
    config: Path,
    exact: bool = False,
    out_dir: Path | None = None,
    quiet: bool = False,
    seed: int | None = None,
    full: bool = False,
) -> None:
    """Which layers int8 breaks, why, and which rules answer them. Writes DIR/sensitivity.json, .svg."""
    cfg, folder = _opened(config, out_dir, seed=seed)
    job = open_job(cfg, folder, progress(quiet))
    sensitivity = sensitivity_of(job, progress(quiet), exact=exact)
    picture = write_sensitivity_svg(folder)
    if not quiet:
        out.print(sensitivity_table(sensitivity, full=full))
        for line in sensitivity.remarks:
            say(line)
        say(f"written: {folder / 'sensitivity.json'}, {picture}")


def sites(config: Path, quiet: bool = False) -> None:
    """Every place where a rule may act, what it would cost, and near misses with the reason."""
    gm = load_network(load_config(config), progress(quiet)).gm
    found = find_sites(gm)
    out.print(sites_table(gm, found))


def run(
    config: Path,
    out_dir: Path | None = None,
    trials: int | None = None,
    timeout: float | None = None,
    workers: int | None = None,
    storage: str | None = None,
    ray: str | None = None,
    tuned: Plans | None = None,
    quiet: bool = False,
    seed: int | None = None,
) -> None:
    """The whole job: check, analyze, fit, search, report. The same command again resumes."""
    cfg, folder = _opened(
        config, out_dir, seed=seed, trials=trials, timeout=timeout, workers=workers
    )
    job, results = _run(with_training(cfg, tuned), folder, storage, quiet, ray=ray)
    show_results(train_chosen(job, results, quiet), quiet)


def worker(folder: Path, storage: str | None = None, quiet: bool = False) -> None:
    """Be one more worker of a running search, wherever its run directory is seen."""
    facts = read_run(folder)
    options = facts.get("options")
    if options is None or "config" not in facts or not (folder / "sensitivity.json").exists():
        raise RunError(
            f"{folder}: no search is running there: "
            f"start one with quantfix run {facts.get('config', 'CONFIG')}"
        )
    place, goal = storage or facts.get("storage"), noted_goal(facts)
    outcome = work(config_of(folder, facts), folder, options, place, goal=goal)
    if not quiet:
        out.print(f"done: {outcome.reason}, {outcome.plans} plans scored")


def front(folder: Path, pictures: bool = False, quiet: bool = False, full: bool = False) -> None:
    """The Pareto front as a plot and a table. Writes DIR/front.json, report.html and report.md."""
    results = load_results(folder)
    if pictures:
        draw(_reopened(results, quiet), progress(quiet))
        results = load_results(folder)
    write_front(results)
    write_report(results)
    show_results(results, quiet, full)


def export(
    folder: Path,
    pick: str = "best",
    out_dir: Path | None = None,
    compared: bool = False,
    untrained: bool = False,
    weights: Path | None = None,
    quiet: bool = False,
    to: str = "",
) -> None:
    """The chosen network: int8 ONNX, float source and weights, ranges, and what changed.

    A plan that was fine-tuned is shipped with its trained weights.
    """
    wanted = checked_forms([name.strip() for name in to.split(",") if name.strip()])
    results = load_results(folder)
    score = results.picked(pick)
    job = _reopened(results, quiet)
    if weights is not None:
        job = with_weights(job, score.plan, weights)
    elif not untrained:
        job, score = as_trained(job, results, score, quiet)
    place = out_dir or folder / "export"
    _export(job, score, place, quiet, compared)
    if wanted:
        with progress(quiet)("writing and measuring other forms") as tick:
            tick(0, 1)
            written = export_forms(job.evaluator, Plan.parse(score.plan), place, wanted)
            tick(1, 1)
        if not quiet:
            out.print(forms_table(written, job.evaluator.task.metric))


def fix(
    config: Path,
    max_drop: float | None = None,
    max_macs: float | None = None,
    max_damage: float | None = None,
    out_dir: Path | None = None,
    trials: int | None = None,
    timeout: float | None = None,
    workers: int | None = None,
    storage: str | None = None,
    quiet: bool = False,
    seed: int | None = None,
    images: Path | None = None,
    target: str | None = None,
    shape: str | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> None:
    """The cheapest plan that meets both goals, in DIR/fixed; exit 1 and the best if none does."""
    if config.suffix in MODEL_FILES:
        folder = out_dir or Path("runs") / config.stem
        written = config_of_model(config, images, folder, target, shape, mean, std, quiet)
        config, out_dir = written.path, folder
        max_damage = MAX_DAMAGE if max_damage is None and max_drop is None else max_damage
    elif any(v is not None for v in (images, target, shape, mean, std)):
        raise ConfigError(
            "fix: --images, --target, --shape, --mean and --std go with an .onnx or .tflite file, not with a config"
        )
    given = {"max_drop": max_drop, "max_macs": max_macs, "max_damage": max_damage}
    cfg, folder = _opened(
        config, out_dir, seed=seed, trials=trials, timeout=timeout, workers=workers, **given
    )
    goal, ratio = Goal(cfg.search.max_drop, cfg.search.max_damage), cfg.search.most_macs
    if goal == Goal():
        raise ConfigError(
            "fix: how much may be lost? --max-drop POINTS, without labels --max-damage DAMAGE (or "
            "search.max_drop, search.max_damage in the config)"
        )
    job, results = _run(cfg, folder, storage, quiet, goal)
    score, met = fixed(job, results, goal)
    written = _export(job, score, folder / "fixed", quiet)
    said = loss_said(results, score)
    asked = f"{goal} at {ratio:g} x MACs"
    if not met:
        say(f"goal not met ({asked}); best so far: {words(results, score)}: {said}", err)
        say(str(written), err)
        raise typer.Exit(GOAL_NOT_MET)
    if not quiet:
        say(f"goal met: {words(results, score)}: {said}")
        say(str(written))


def _run(
    cfg: Config,
    folder: Path,
    storage: str | None,
    quiet: bool,
    goal: Goal | None = None,
    ray: str | None = None,
) -> tuple[Job, Results]:
    """Analyse and search; whatever ends it, the front of what is scored is on disk."""
    bars = progress(quiet)
    job = open_job(cfg, folder, bars)

    def shown(sensitivity: Sensitivity) -> None:
        if not quiet:
            out.print(sensitivity_table(sensitivity, 8))
            for line in sensitivity.remarks:
                say(line)

    results = optimize(job, bars, storage=storage, goal=goal, ray=ray, analyzed=shown)
    return job, results


def _opened(config: Path, folder: Path | None, **options: Any) -> tuple[Config, Path]:
    cfg = with_options(load_config(config), **options)
    return cfg, folder or Path("runs") / cfg.path.stem


def config_of(folder: Path, facts: Mapping[str, Any]) -> Path:
    """The config file of a run.

    Raises:
        RunError: the run has none.
    """
    if facts["config"] == IN_MEMORY:
        raise RunError(
            f"{folder}: its network was given from Python, and is not in it: call quantfix.optimize(..., "
            f"out={str(folder)!r}) there again, which resumes, and export() of what it returns"
        )
    return Path(facts["config"])


def _reopened(results: Results, quiet: bool) -> Job:
    cfg = load_config(config_of(results.folder, results.facts))
    cfg = with_options(cfg, **results.facts.get("options", {}))
    return open_job(cfg, results.folder, progress(quiet))


def _export(job: Job, score: Score, folder: Path, quiet: bool, compared: bool = False) -> Path:
    """Write the files of a plan, and say what is to be known of them; gives the path of the int8 file."""
    with progress(quiet)("writing and measuring the file") as tick:
        tick(0, 1)
        shipped = ship(job, score, folder, compared)
        tick(1, 1)
    exported = shipped.exported
    if not quiet:
        if shipped.refusal:
            say(f"no streaming file: {shipped.refusal}")
        for found in exported.findings:
            say(f"{found.code}: {found.node + ': ' if found.node else ''}{found.message}")
        if compared:
            first = exported.departure
            say(
                "simulation and ONNX Runtime agree on every value"
                if first is None
                else f"simulation and ONNX Runtime first depart at {first.layer}: {first.differs:.2%} of its "
                f"elements differ, {first.sqnr_db:.1f} dB"
            )
        if exported.clocked is not None:
            out.print(clock_table(exported.clocked))
            say(exported.clocked.verdict)
        for file in shipped.files:
            say(f"written: {file}")
    return next(f for f in shipped.files if f.suffix in (".onnx", ".tflite"))
