"""Runs on what is in memory: optimize, analyze, fix. Each has a run directory and resumes there, as the commands do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantfix._inputs import data_of
from quantfix._progress import bars
from quantfix._result import Result
from quantfix._tasks import PLACEHOLDER, Metric, config_of, name_of, named_by, task_of
from rewriter.storage import Digest
from search.config.schema import ConfigError
from search.data.datasets import Data, Inputs
from search.data.model import on_cpu_in_float32
from search.job import Given, Job, Progress, open_job
from search.optimize import fixed
from search.optimize import optimize as run_job
from search.report.notebook import NotebookSensitivity, shown_sensitivity
from search.run import Goal, sensitivity_of

RUNS = Path("runs")


def optimize(
    model: nn.Module,
    calibration: Any,
    evaluation: Any = None,
    *,
    target: str = "onnxruntime",
    task: str | None = None,
    task_args: Mapping[str, Any] | None = None,
    metric: str | Metric | None = None,
    higher_is_better: bool = True,
    postprocess: Callable[[Any], Any] | None = None,
    outputs: Any = None,
    trials: int = 100,
    macs: float | tuple[float, float] | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
    device: str = "auto",
    **search: Any,
) -> Result:
    """Find the layers that int8 breaks, rewrite the network around them, and search for the best trade of MACs and quality.

    The same call with the same ``out`` resumes.

    Args:
        model: The trained float network; it is copied and never touched.
        calibration: Inputs that ranges are measured on: a tensor (n, C, H, W), a map-style data set, a DataLoader, or a
            list of samples or batches. Targets beside them are not used to calibrate.
        evaluation: What plans are compared on, in the same forms, with targets as a tuple (x, y), in the data set or in the
            loader's batches; without targets the objective is the damage. None: every third calibration sample.
        target: The int8 profile that is shipped for; ``rewriter.TARGETS`` lists them.
        task: What the network is for, as ``task`` of a config. None: what the metric says; else classification where the
            targets are numbers of classes, and ``unlabelled`` where there are none.
        task_args: What the task may be told, as ``task_args`` of a config.
        metric: The task's own (``top1``, ``ap``, ``miou``, ``nme``, ...), or a callable: outputs as ``forward`` returns them,
            for all samples, and their targets, to a number.
        higher_is_better: Direction of a metric of one's own.
        postprocess: Raw outputs to what the task reads, such as a list of ``{"boxes", "scores", "labels"}`` for detection.
        outputs: What each output means, where the task does not say it, as ``outputs`` of a config.
        trials: How many plans are scored in all.
        macs: Bounds of the cost that the front may have, relative to the network as it is; one number is the upper bound.
        out: The run directory. None: ``runs/NAME-DIGEST``, one for each network and data.
        seed: Of the search and the fits.
        progress: Whether to show how far it is. None: in a notebook and on a terminal.
        device: Where torch runs.
        search: Other keys of the section ``search`` of a config, such as ``max_float_layers=0`` or ``timeout=600``.

    Raises:
        ConfigError: an argument cannot be used; the message says which, and why.
        RunError: the run directory holds a run of another network, data or target.
        RewriteError: the network cannot be traced or quantized.
    """
    given = _given(
        model, calibration, evaluation, task, task_args, metric, higher_is_better, postprocess
    )
    options = {"trials": trials, "seed": seed, **_costs(macs), **search}
    shown = bars(progress)
    job = _job(given, target, device, outputs, options, out, shown)
    return Result(job, run_job(job, shown), shown)


def fix(
    model: nn.Module,
    calibration: Any,
    evaluation: Any = None,
    *,
    max_damage: float | None = None,
    max_drop: float | None = None,
    max_macs: float | None = None,
    target: str = "onnxruntime",
    task: str | None = None,
    task_args: Mapping[str, Any] | None = None,
    metric: str | Metric | None = None,
    higher_is_better: bool = True,
    postprocess: Callable[[Any], Any] | None = None,
    outputs: Any = None,
    trials: int = 100,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
    device: str = "auto",
    **search: Any,
) -> Result:
    """Search until a plan meets a goal, and choose the cheapest that does.

    ``chosen`` of the result is that plan and ``met`` true, else the best plan and false; ``export`` writes it.

    Args:
        model: As for `optimize`, as all that is not said here.
        calibration: As for `optimize`.
        evaluation: As for `optimize`.
        max_damage: Largest damage, which needs no labels.
        max_drop: Largest loss against the float network, in points of the metric.
        max_macs: Largest cost, relative to the network as it is.
        target: As for `optimize`.
        task: As for `optimize`.
        task_args: As for `optimize`.
        metric: As for `optimize`.
        higher_is_better: As for `optimize`.
        postprocess: As for `optimize`.
        outputs: As for `optimize`.
        trials: As for `optimize`.
        out: As for `optimize`.
        seed: As for `optimize`.
        progress: As for `optimize`.
        device: As for `optimize`.
        search: As for `optimize`.

    Raises:
        ConfigError: no goal is given, or an argument cannot be used.
    """
    goal = Goal(max_drop, max_damage)
    if goal == Goal():
        raise ConfigError("fix: how much may be lost? give max_damage, or max_drop with labels")
    given = _given(
        model, calibration, evaluation, task, task_args, metric, higher_is_better, postprocess
    )
    limits = {"max_drop": max_drop, "max_damage": max_damage, "max_macs": max_macs}
    limits = {key: value for key, value in limits.items() if value is not None}
    options = {"trials": trials, "seed": seed, **limits, **search}
    shown = bars(progress)
    job = _job(given, target, device, outputs, options, out, shown)
    results = run_job(job, shown, goal=goal)
    chosen, met = fixed(job, results, goal)
    return Result(job, results, shown, chosen, met)


def analyze(
    model: nn.Module,
    calibration: Any,
    evaluation: Any = None,
    *,
    target: str = "onnxruntime",
    task: str | None = None,
    task_args: Mapping[str, Any] | None = None,
    metric: str | Metric | None = None,
    higher_is_better: bool = True,
    postprocess: Callable[[Any], Any] | None = None,
    outputs: Any = None,
    exact: bool = False,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
    device: str = "auto",
) -> NotebookSensitivity:
    """Which layers int8 breaks, why, and which rules answer them; most harmful first in ``layers``.

    Args:
        model: As for `optimize`, as all that is not said here.
        calibration: As for `optimize`.
        evaluation: As for `optimize`.
        target: As for `optimize`.
        task: As for `optimize`.
        task_args: As for `optimize`.
        metric: As for `optimize`.
        higher_is_better: As for `optimize`.
        postprocess: As for `optimize`.
        outputs: As for `optimize`.
        exact: Measure every layer, not only the most harmful ones of a screening.
        out: As for `optimize`, which then goes on from this analysis.
        seed: As for `optimize`.
        progress: As for `optimize`.
        device: As for `optimize`.
    """
    given = _given(
        model, calibration, evaluation, task, task_args, metric, higher_is_better, postprocess
    )
    shown = bars(progress)
    job = _job(given, target, device, outputs, {"seed": seed}, out, shown)
    return shown_sensitivity(sensitivity_of(job, shown, exact=exact))


def _given(
    model: Any,
    calibration: Any,
    evaluation: Any,
    task: str | None,
    task_args: Mapping[str, Any] | None,
    metric: str | Metric | None,
    higher_is_better: bool,
    postprocess: Callable[[Any], Any] | None,
) -> Given:
    network = _model(model)
    data = data_of(calibration, evaluation, video=(task or named_by(metric)) == "video")
    name = name_of(task, metric, data)
    if name == "unlabelled" and isinstance(data.evaluation[0], tuple | list):
        data = replace(data, evaluation=Inputs(data.evaluation))
    return Given(network, data, task_of(name, task_args, metric, higher_is_better, postprocess))


def _job(
    given: Given,
    target: str,
    device: str,
    outputs: Any,
    options: dict[str, Any],
    out: str | Path | None,
    progress: Progress,
) -> Job:
    if options.get("workers", 1) != 1:
        raise ConfigError("search.workers: a network in memory is searched by one process")
    content: dict[str, Any] = {
        "task": given.task.name,
        "target": target,
        "device": device,
        "outputs": outputs,
        "search": options,
    }
    if given.task.name == "custom":
        content["metric"] = {"factory": PLACEHOLDER}
    cfg = config_of(content)
    folder = _own_folder(given, target) if out is None else Path(out)
    return open_job(cfg.read_from(Path("quantfix")), folder, progress, given=given)


def _costs(macs: float | tuple[float, float] | None) -> dict[str, Any]:
    """The keys of ``search`` that say what the front may cost."""
    if macs is None:
        return {}
    low, high = (None, macs) if isinstance(macs, int | float) else macs
    if low is not None and not 0 < low <= high:
        raise ConfigError(f"macs: must be (low, high) with 0 < low <= high: {macs}")
    return {"max_macs": high} if low is None else {"macs": [low, high]}


def _model(model: Any) -> nn.Module:
    """The network itself where it can be traced as it is, else a copy in float32 on the CPU."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: must be an nn.Module: {type(model).__name__}")
    tensors = [*model.parameters(), *model.buffers()]
    plain = all(
        t.device.type == "cpu" and t.dtype == torch.float32
        for t in tensors
        if t.is_floating_point()
    )
    return model if plain else on_cpu_in_float32(copy.deepcopy(model))


def _own_folder(given: Given, target: str) -> Path:
    """A run directory of its own for each network, data, metric and target."""
    digest = Digest()
    digest.add(given.model.state_dict())
    digest.add([target, given.task.name, given.task.metric, *_seen(given.data)])
    return RUNS / f"{type(given.model).__name__}-{digest.hex()[:8]}"


def _seen(data: Data) -> list[Any]:
    """How many samples each split has, and the first and last of them."""
    found: list[Any] = []
    for split in (data.calibration, data.evaluation):
        found += [len(split), split[0], split[len(split) - 1]]
    return found
