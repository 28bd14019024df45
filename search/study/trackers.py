"""Scores as they come, in what teams watch their experiments with: TensorBoard, MLflow, Weights & Biases.

``search: {trackers: [tensorboard]}``. Each is one class; its package is needed only where it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from search.config.schema import ConfigError
from search.pareto.plan_summary import plan_summary
from search.run_dir.scores import Score

MEASURED = (
    "metric",
    "metric_float",
    "damage",
    "macs_ratio",
    "latency_ms",
    "predicted_ms",
    "float_layers",
)


class Tracker(Protocol):
    """Where scores go; closed when the search ends."""

    def add(self, values: dict[str, float], plan: str, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars by the number of plans scored, in ``tensorboard/`` of the run directory."""

    def __init__(self, folder: Path, name: str) -> None:
        del name
        found: Any = _module("torch.utils.tensorboard", "tensorboard")
        self.writer = found.SummaryWriter(str(folder / "tensorboard"))

    def add(self, values: dict[str, float], plan: str, step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.add_text("plan", plan, step)

    def close(self) -> None:
        self.writer.close()


class MLflow:
    """A run of the experiment ``quantfix`` where MLflow's own settings point to; the report is its artifact."""

    def __init__(self, folder: Path, name: str) -> None:
        self.mlflow: Any = _module("mlflow", "mlflow")
        self.folder = folder
        self.mlflow.set_experiment("quantfix")
        self.mlflow.start_run(run_name=name)

    def add(self, values: dict[str, float], plan: str, step: int) -> None:
        self.mlflow.log_metrics(values, step=step)
        self.mlflow.set_tag(f"plan_{step}", plan[:500])

    def close(self) -> None:
        self.mlflow.end_run()


class WandB:
    """A run of the project ``quantfix``."""

    def __init__(self, folder: Path, name: str) -> None:
        found: Any = _module("wandb", "wandb")
        self.run = found.init(project="quantfix", name=name, dir=str(folder))

    def add(self, values: dict[str, float], plan: str, step: int) -> None:
        self.run.log({**values, "plan": plan}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


@contextmanager
def tracked(
    names: Sequence[str], folder: Path, name: str
) -> Generator[Callable[[Score, int], None]]:
    """Open the trackers that a config names; what is yielded is told of each score.

    Args:
        names: Of `TRACKERS`.
        folder: The run directory.
        name: Of the run.

    Raises:
        ConfigError: a package is not installed.
    """
    with ExitStack() as stack:
        opened: list[Tracker] = []
        for wanted in dict.fromkeys(names):
            tracker = TRACKERS[wanted](folder, name)
            stack.callback(tracker.close)
            opened.append(tracker)

        def told(score: Score, count: int) -> None:
            if score.error is not None or score.stopped:
                return
            known = {key: getattr(score, key) for key in MEASURED}
            values = {key: float(value) for key, value in known.items() if value is not None}
            for tracker in opened:
                tracker.add(values, plan_summary(score.plan), count)

        yield told


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"search.trackers: {package} is not installed: pip install {package}"
        ) from error
