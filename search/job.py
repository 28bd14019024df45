"""One run from its config to its front: load, trace, analyse, search."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnxruntime
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rewriter import profile, target, trace
from rewriter.damage import MeaningError, declared, fidelity_of, measure_fidelity
from rewriter.graph import facts, layers
from rewriter.int8 import QuantScheme
from rewriter.int8.onnx import ReadBack
from rewriter.storage import (
    Digest,
    Mirror,
    Place,
    PlaceError,
    Store,
    checked,
    inside,
    key,
    model_digest,
)
from search.config.schema import Config, ConfigError
from search.data.datasets import Data, Inputs, batches, load_data
from search.data.evaluation_set import Tick, check_outputs, chosen_on, load_samples, shuffled
from search.data.model import load_model
from search.data.overlap import mark, warn_of_overlap
from search.data.user_code import callable_digest
from search.engines import Engine, EngineError, refusal, scoring_engine
from search.latency.table import Table, this_machine, user_table
from search.run_dir.files import RunError
from search.run_dir.fingerprint import rules_digest, source_digest
from search.run_dir.scores import Confirmations, Records, Score, fingerprint, open_run
from search.scoring.evaluator import RewriteEvaluator
from search.scoring.expected import unexpected
from search.scoring.trial import trial
from search.tasks import Task, task

log = logging.getLogger(__name__)

IN_MEMORY = "in memory"
"""What ``run.json`` says in place of a config whose network and data were given from Python."""

Progress = Callable[[str], AbstractContextManager[Tick]]
OnScore = Callable[[Score, int], None]


@contextmanager
def silent(label: str) -> Generator[Tick]:
    """Progress that shows nothing."""
    del label
    yield lambda done, total: None


@dataclass(frozen=True)
class Given:
    """A network, its data and its task that are in memory, instead of what a config says."""

    model: nn.Module
    data: Data
    task: Task


@dataclass(frozen=True)
class Network:
    """A config's network, traced, its data, and what the file of plain int8 computes."""

    cfg: Config
    gm: fx.GraphModule
    data: Data
    task: Task
    calibration: tuple[Tensor, ...]
    engine: Engine  # what scores int8 candidates
    file: ReadBack  # what the file of plain int8 does


@dataclass(frozen=True)
class Job:
    """A run directory and the evaluator that fills it."""

    cfg: Config
    folder: Path
    evaluator: RewriteEvaluator
    data: Data
    given: Given | None = None
    # search spaces laid out so far (search.strategy.space.Space), each with its ranking
    spaces: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def gm(self) -> fx.GraphModule:
        return self.evaluator.gm

    @property
    def records(self) -> Records:
        return self.evaluator.records

    def model(self) -> nn.Module:
        """The network as it was before it was traced."""
        return load_model(self.cfg) if self.given is None else self.given.model

    @property
    def objective(self) -> Literal["metric", "damage"]:
        wanted = self.cfg.search.objective
        if wanted != "auto":
            return wanted
        return "damage" if self.evaluator.samples.targets is None else "metric"


def load_network(cfg: Config, progress: Progress = silent, given: Given | None = None) -> Network:
    """Load a config's model and data, unless they are given, and trace the model.

    Raises:
        ConfigError: the model or the data cannot be had, or no int8 file of it can be run.
        TraceError: the model cannot be traced.
    """
    if given is None:
        model, data = load_model(cfg), load_data(cfg)
    else:
        model, data = given.model, given.data
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
    if not layers(gm):
        hidden = "; ".join(
            f"{part.name} is kept whole: {part.reason}" for part in facts.OPAQUE.of(gm)
        )
        why = f" ({hidden})" if hidden else ""
        raise ConfigError(
            f"model: no convolution, linear layer or matrix product to quantize{why}"
        )
    facts.CALIBRATION.put(gm, cfg.calibration.method)
    scheme = target(cfg.target)
    facts.SCHEME.put(gm, scheme)
    goal = task(cfg) if given is None else given.task
    goal.attach(gm)
    profile(gm, found)
    try:
        said = None if cfg.outputs is None else declared(cfg.outputs)
        facts.FIDELITY.put(gm, measure_fidelity(gm, found, said, goal.purpose))
    except MeaningError as error:
        if cfg.outputs is not None:
            raise ConfigError(f"{cfg.path.name}: {error}") from error
        fact = f"output {str(error).removeprefix('outputs: ')}"
        raise ConfigError(f"model: does not fit task {goal.name}: {fact}") from error
    engine = engine_of(cfg, gm, found[0][:2])
    file = trial(gm, target(cfg.target), found, engine)
    return Network(cfg, gm, data, goal, tuple(found), engine, file)


def engine_of(cfg: Config, gm: fx.GraphModule, images: Tensor) -> Engine:
    """What runs int8 candidates: the first engine of the config, by default of the target, that can run this network here.

    Raises:
        ConfigError: none of them can.
    """
    scheme = target(cfg.target)
    try:
        return scoring_engine(cfg.target, cfg.engines, lambda e: refusal(e, gm, scheme, images))
    except EngineError as cause:
        raise ConfigError(f"{cfg.path.name}: {cause}") from cause


def float_metric(network: Network, count: int = 256) -> str:
    """What the float network reaches on its first samples, in words; warns where it is not what the config expects."""
    found: list[list[Tensor]] = []
    targets: list[Any] = []
    marks: list[bytes] = []
    done = 0
    with torch.no_grad():
        for batch in batches(network.data.evaluation, 32):
            x, y = batch if isinstance(batch, tuple) else (batch, None)
            marks += map(mark, x)
            leaves = pytree.tree_leaves(network.gm(x))
            found.append([o for o in leaves if isinstance(o, Tensor)])
            targets += [] if y is None else list(y)
            done += len(x)
            if done >= count:
                break
    warn_of_overlap(network.calibration, marks)
    outputs = [torch.cat(parts) for parts in zip(*found, strict=True)]
    check_outputs(outputs, done)
    if not targets:
        return f"runs on the first {done} samples; no labels"
    stacked: Any = torch.stack(targets) if isinstance(targets[0], Tensor) else targets
    value = network.task.score(outputs, stacked)
    odd = unexpected(network.cfg.expect.float, value, done, network.task.metric)
    if odd:
        log.warning("expect.float: %s", odd)
    return f"{network.task.metric} {value:.2%} on the first {done} samples"


def open_job(
    cfg: Config,
    folder: Path,
    progress: Progress = silent,
    threads: int | None = None,
    given: Given | None = None,
) -> Job:
    """Load everything, and claim the run directory or continue the run that is in it.

    Raises:
        ConfigError: the model or the data cannot be had.
        RunError: the directory holds a run of another model, data or target.
        TraceError: the model cannot be traced.
    """
    network = load_network(cfg, progress, given)
    device = device_of_run(cfg)
    with progress("reading evaluation images") as tick:
        evaluation = network.data.evaluation
        samples = load_samples(evaluation, tick, order=shuffled(len(evaluation)))
    if samples.targets is None and cfg.search.objective == "metric":
        raise ConfigError(
            f"{cfg.path.name}: search.objective: metric: the evaluation data have no labels"
        )
    warn_of_overlap(network.calibration, samples.marks)
    chosen = chosen_on(samples.count, cfg.search.confirmation)
    scheme = target(cfg.target)
    engine = network.engine
    calibration = Digest()
    calibration.add([cfg.calibration.method, *network.calibration])
    parts = {
        "model": model_digest(network.gm),
        "calibration": calibration.hex(),
        "evaluation": samples.digest,
        "target": _scheme_digest(scheme, engine.name),
        "damage": fidelity_of(network.gm).digest,
        "metric": key([source_digest(network.task), *_user_functions(network.task)]),
        "rules": rules_digest(),
        "seed": str(cfg.search.seed),
        "confirmation": f"{chosen} of {samples.count} choose",
    }
    about = {
        "config": str(cfg.path) if given is None else IN_MEMORY,
        "task": network.task.name,
        "metric": network.task.metric,
        "higher_is_better": network.task.higher_is_better,
        "target": cfg.target,
        "engine": engine.name,
        "samples": samples.count,
        "outputs": list(fidelity_of(network.gm).about),
        "selection_samples": chosen,
        "calibration_samples": sum(len(x) for x in network.calibration),
        "versions": {
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            engine.name: engine.version(),
            "python": platform.python_version(),
        },
    }
    changed = open_run(folder, parts, about)
    if changed:
        log.warning(
            "%s: %s changed since the last run: its scores are not reused",
            folder,
            ", ".join(changed),
        )
    place = place_of(cfg)
    records = Records(folder, fingerprint(parts), place)
    evaluator = RewriteEvaluator(
        gm=network.gm,
        scheme=scheme,
        task=network.task,
        calibration=network.calibration,
        samples=samples,
        records=records,
        engine=engine.name,
        device=device,
        store=_fits(folder, place),
        seed=cfg.search.seed,
        threads=threads or torch.get_num_threads(),
        confirmations=Confirmations.of(records, chosen) if chosen < samples.count else None,
        timed=cfg.search.cost == "latency" or cfg.search.max_latency_ms is not None,
        table=table_of(cfg),
    )
    return Job(cfg, folder, evaluator, network.data, given)


def table_of(cfg: Config) -> Table:
    """The times of kernels that a run's plans are priced by.

    Raises:
        ConfigError: the config names a table that cannot be used.
    """
    if cfg.latency.table is None:
        return this_machine()
    try:
        return user_table(cfg.resolve(cfg.latency.table))
    except RunError as cause:
        raise ConfigError(f"{cfg.path.name}: latency.table: {cause}") from cause


def place_of(cfg: Config) -> Place | None:
    """Where a run shares its fits and scores with others; None: nowhere.

    Raises:
        ConfigError: it is a URL that cannot be opened here.
    """
    where = cfg.search.store
    if where is None:
        return None
    if "://" not in where:
        return cfg.resolve(where)
    try:
        return checked(where)
    except PlaceError as cause:
        raise ConfigError(f"{cfg.path.name}: search.store: {cause}") from cause


def _fits(folder: Path, place: Place | None) -> Store:
    if place is None:
        return folder / "fits"
    there = inside(place, "fits")
    return there if isinstance(there, Path) else Mirror(folder / "fits", there)


def device_of_run(cfg: Config) -> str:
    """Where torch runs.

    Raises:
        ConfigError: the config asks for a GPU that torch does not see.
    """
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = ("cuda" if seen else "cpu") if cfg.device == "auto" else cfg.device
    if device == "cpu":
        return device
    number = int(device.partition(":")[2] or 0)
    if number >= seen:
        raise ConfigError(
            f"{cfg.path.name}: device: {device}: torch sees {seen} CUDA devices here"
        )
    # 10 bits of mantissa in the float network's convolutions would look like damage of int8
    torch.backends.cudnn.allow_tf32 = False
    return device


def _inputs(dataset: Any) -> Any:
    return Inputs(dataset) if isinstance(dataset[0], tuple | list) else dataset


def _scheme_digest(scheme: QuantScheme, engine: str) -> str:
    digest = Digest()
    digest.add([scheme.identity, engine])
    return digest.hex()


def _user_functions(goal: Task) -> list[str]:
    found = (getattr(goal, name, None) for name in ("postprocess", "function"))
    return [callable_digest(f) for f in found if f is not None]
