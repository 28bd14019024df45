"""One run from its config to its front: load, trace, analyse, search."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnxruntime
import torch
from torch import Tensor, fx

from rewriter import Plan, Step, find_sites, profile, target, trace
from rewriter.graph import layers, unflatten
from rewriter.int8.scheme import QuantScheme
from search.analysis import Sensitivity, analyze, damage_by_node, read_sensitivity, write_sensitivity
from search.config import Config, ConfigError, load_config
from search.data import Data, Inputs, batches, load_data, load_model
from search.evaluator import RewriteEvaluator, Tick, extra_macs, load_samples
from search.fingerprint import Digest, model_digest, rules_digest, source_digest
from search.records import Records, Score, fingerprint, note, open_run
from search.space import (
    KEEP_FLOAT,
    Budget,
    Space,
    make_space,
    predicted_front,
    reference_plans,
    single_plans,
)
from search.study import Outcome, Settings, search, storage_at
from search.tasks import Task, task

log = logging.getLogger(__name__)

Progress = Callable[[str], AbstractContextManager[Tick]]
Told = Callable[[Score, int], None]


@contextmanager
def silent(label: str) -> Iterator[Tick]:
    """Progress that shows nothing."""
    del label
    yield lambda done, total: None


@dataclass(frozen=True)
class Network:
    """A config's network, traced, and its data."""

    cfg: Config
    gm: fx.GraphModule
    data: Data
    task: Task
    calibration: tuple[Tensor, ...]


@dataclass(frozen=True)
class Job:
    """A run directory and the evaluator that fills it."""

    cfg: Config
    folder: Path
    evaluator: RewriteEvaluator

    @property
    def gm(self) -> fx.GraphModule:
        return self.evaluator.gm

    @property
    def records(self) -> Records:
        return self.evaluator.records

    @property
    def objective(self) -> Literal["metric", "damage"]:
        wanted = self.cfg.search.objective
        if wanted != "auto":
            return wanted
        return "damage" if self.evaluator.samples.targets is None else "metric"


def load_network(cfg: Config, progress: Progress = silent) -> Network:
    """Load a config's model and data and trace the model.

    Raises:
        ConfigError: the model or the data cannot be had.
        TraceError: the model cannot be traced.
    """
    model, data = load_model(cfg), load_data(cfg)
    found: list[Tensor] = []
    limit = cfg.calibration.samples or len(data.calibration)
    total, done = min(limit, len(data.calibration)), 0
    with progress("reading calibration images") as tick:
        for batch in batches(_inputs(data.calibration), 32):
            found.append(batch[: total - done])
            done += len(found[-1])
            tick(done, total)
            if done >= total:
                break
    gm = trace(model, found[0][:2])
    gm.meta["calibration"] = cfg.calibration.method
    profile(gm, found)
    goal: Any = task(cfg)
    if hasattr(goal, "unflatten"):
        goal.unflatten = lambda flat: unflatten(gm, list(flat))  # pyright: ignore[reportUnknownLambdaType]
    return Network(cfg, gm, data, goal, tuple(found))


def open_job(cfg: Config, folder: Path, progress: Progress = silent, threads: int | None = None) -> Job:
    """Load everything, and claim the run directory or continue the run that is in it.

    Raises:
        ConfigError: the model or the data cannot be had.
        RunError: the directory holds a run of another model, data or target.
        TraceError: the model cannot be traced.
    """
    network = load_network(cfg, progress)
    with progress("reading evaluation images") as tick:
        samples = load_samples(network.data.evaluation, tick)
    if samples.targets is None and cfg.search.objective == "metric":
        raise ConfigError(f"{cfg.path.name}: search.objective: metric: the evaluation data have no labels")
    scheme = target(cfg.target)
    engine = scheme.engine if cfg.engine == "auto" else cfg.engine
    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    calibration = Digest()
    calibration.add([cfg.calibration.method, *network.calibration])
    parts = {
        "model": model_digest(network.gm),
        "calibration": calibration.hex(),
        "evaluation": samples.digest,
        "target": _scheme_digest(scheme, engine),
        "metric": source_digest(network.task, *_user_functions(network.task)),
        "rules": rules_digest(),
        "seed": str(cfg.search.seed),
    }
    about = {
        "config": str(cfg.path),
        "task": network.task.name,
        "metric": network.task.metric,
        "higher_is_better": network.task.higher_is_better,
        "target": cfg.target,
        "engine": engine,
        "samples": samples.count,
        "calibration_samples": sum(len(x) for x in network.calibration),
        "versions": {
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
    }
    changed = open_run(folder, parts, about)
    if changed:
        log.warning("%s: %s changed since the last run: its scores are not reused", folder, ", ".join(changed))
    evaluator = RewriteEvaluator(
        gm=network.gm,
        scheme=scheme,
        task=network.task,
        calibration=network.calibration,
        samples=samples,
        records=Records(folder, fingerprint(parts)),
        engine=engine,
        device=device,
        store=folder / "fits",
        seed=cfg.search.seed,
        threads=threads or min(2, os.cpu_count() or 1),
    )
    return Job(cfg, folder, evaluator)


def sensitivity_of(job: Job, progress: Progress = silent) -> Sensitivity:
    """The analysis of a run: the one in its directory, or a new one."""
    known = read_sensitivity(job.folder, job.records.fingerprint)
    if known is not None:
        return known
    with progress("quantizing one layer at a time") as tick:
        found = analyze(job.evaluator, tick)
    write_sensitivity(job.folder, found, job.records.fingerprint)
    note_baseline(job)
    return found


def note_baseline(job: Job) -> None:
    """Write what every reader of the run directory needs: float and int8 of the network as it is."""
    budget = budget_of(job)
    note(
        job.folder,
        baseline=asdict(job.evaluator.baseline()),
        objective=job.objective,
        limits={"macs": budget.macs, "float_layers": budget.float_layers},
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
    return make_space(usable, damage_by_node(sensitivity), known, baseline.macs, budget_of(job))


def worth_trying(space: Space, sensitivity: Sensitivity) -> Callable[[Mapping[str, Score]], list[Plan]]:
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
) -> Outcome:
    """Search until the config's budget is used up; the same call again goes on from there."""
    space = space_of(job, sensitivity)
    if space.dropped:
        log.warning(
            "%d of %d anchors searched: the damage of the others is at most %.2g",
            len(space.choices), len(space.choices) + len(space.dropped),
            max((damage_by_node(sensitivity).get(a, 0.0) for a in space.dropped), default=0.0),
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
    return search(job.evaluator, job.records, space, worth_trying(space, sensitivity), settings, place, told)


@contextmanager
def helpers(cfg: Config, folder: Path, storage: str | None) -> Iterator[None]:
    """Further worker processes of a run, as many as the config asks for beside this one; they end with the search."""
    context = multiprocessing.get_context("spawn")
    options = {"trials": cfg.search.trials, "seed": cfg.search.seed, "timeout": cfg.search.timeout}
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


def _inputs(dataset: Any) -> Any:
    return Inputs(dataset) if isinstance(dataset[0], tuple | list) else dataset


def _study_name(job: Job, space: Space) -> str:
    """One study per space, objective and seed: a changed space would not fit the old trials."""
    text = repr((
        job.records.fingerprint, sorted(space.choices.items()), space.budget, job.objective, job.cfg.search.seed,
    ))  # fmt: skip
    return f"{job.cfg.path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _scheme_digest(scheme: QuantScheme, engine: str) -> str:
    # a frozenset prints in another order in each process
    plain = replace(scheme, fuses=frozenset(), shared_at=frozenset())
    digest = Digest()
    digest.add([repr(plain), sorted(t.__name__ for t in scheme.fuses), sorted(scheme.shared_at), engine])
    return digest.hex()


def _user_functions(goal: Task) -> list[object]:
    found = getattr(goal, "postprocess", None)
    return [] if found is None else [found]
