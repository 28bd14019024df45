"""The task of a run from Python: named, or what the metric and the targets say that it is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from search.config.messages import dotted, explain
from search.config.schema import POSTPROCESSED, TASKS, Config, ConfigError
from search.data.datasets import Data
from search.tasks import TASKS as TASK_FILES
from search.tasks import Task, task
from search.tasks.custom import Custom
from search.tasks.detection import Detection

Metric = Callable[[Any, Any], float]
PLACEHOLDER = "quantfix:given"  # in a config whose network and data are in memory
_OF_METRIC = {"top1": "classification", "ap": "detection", "auc": "video"}


def config_of(content: Mapping[str, Any]) -> Config:
    """The config of a run on what is in memory.

    Raises:
        ConfigError: a value cannot be used; the message names its key.
    """
    given = {"factory": PLACEHOLDER}
    try:
        return Config.model_validate({"model": given, "data": given, **content})
    except ValidationError as error:
        faults = [f"{dotted(e['loc'])}: {explain(e, Config)}" for e in error.errors()]
        raise ConfigError("; ".join(faults)) from error


def name_of(name: str | None, metric: str | Metric | None, data: Data) -> str:
    """The name of the task, where the user may not have said it.

    Raises:
        ConfigError: it is unknown, or must be said.
    """
    if metric is not None and not isinstance(metric, str):
        if not callable(metric):
            raise ConfigError(f"metric: must be a name or a callable: {type(metric).__name__}")
        return "custom"
    if name is not None:
        if name not in TASKS:
            raise ConfigError(f"task: unknown: {name!r}; known: {', '.join(TASKS)}")
        return name
    if metric is not None:
        found = named_by(metric)
        if found is None:
            raise ConfigError(f"metric: {metric!r}: which task? give task, or a callable")
        return found
    sample: Any = data.evaluation[0]
    if not (isinstance(sample, tuple | list) and len(sample) == 2):
        return "unlabelled"
    if _is_class(sample[1]):
        return "classification"
    raise ConfigError(
        f"task: must be named where targets are no numbers of classes: {type(sample[1]).__name__}; "
        f"known: {', '.join(TASKS)}"
    )


def named_by(metric: Any) -> str | None:
    """The task whose own metric this is, where only one has it."""
    return _OF_METRIC.get(metric) if isinstance(metric, str) else None


def task_of(
    name: str,
    args: Mapping[str, Any] | None,
    metric: str | Metric | None,
    higher_is_better: bool,
    postprocess: Callable[[Any], Any] | None,
) -> Task:
    """The task, with what it needs.

    Raises:
        ConfigError: something of it is missing, or does not go with it.
    """
    if name == "custom":
        if not callable(metric):
            raise ConfigError("task custom: metric: must be a callable on outputs and targets")
        return Custom(metric, higher_is_better)
    if postprocess is not None and name not in POSTPROCESSED:
        raise ConfigError(f"postprocess goes with task {', '.join(POSTPROCESSED)}, not {name}")
    if postprocess is not None and not callable(postprocess):
        raise ConfigError(f"task {name}: postprocess: must be a callable on raw outputs")
    if name == "detection":
        if postprocess is None:
            raise ConfigError("task detection: postprocess: must be a callable on raw outputs")
        return _measured_by(Detection(postprocess), metric)
    args = dict(args or {})
    if isinstance(metric, str) and hasattr(importlib.import_module(TASK_FILES[name]), "MEASURES"):
        args.setdefault("measure", metric)
    made: Any = task(config_of({"task": name, "task_args": args}))
    if postprocess is not None:
        made.postprocess = postprocess
    return _measured_by(made, metric)


def _measured_by(made: Task, metric: Any) -> Task:
    if metric is not None and metric != made.metric:
        raise ConfigError(
            f"metric: {metric!r}: task {made.name} has {made.metric}; another one is given as a callable"
        )
    return made


def _is_class(target: Any) -> bool:
    """Whether a target is one whole number."""
    if isinstance(target, Tensor | np.ndarray | np.generic):
        array = np.asarray(target)
        return array.ndim == 0 and np.issubdtype(array.dtype, np.integer)
    return isinstance(target, int) and not isinstance(target, bool)
