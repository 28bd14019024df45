"""The table of the first depthwise separable convolution: what replacing it, and only it, is worth.

Float metric, int8 metric and MACs as the network is, with that convolution replaced by a regular one, and after distillation and
after training with labels on top of it, all relative to float = 100. A training may gain without any rewrite, and so may free rewrites:
both stand below as controls. Every row is stored when it is known, so a killed table goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx

from rewriter import Plan, RewriteError, Step, find_sites
from rewriter.ladder import REMEDIES
from search.config.schema import FinetuneConfig
from search.finetune.data import has_labels
from search.finetune.run import Finetuner
from search.job import Job, Progress, silent
from search.run_dir.files import write_json
from search.run_dir.scores import Score
from search.tasks.detection import Detection

RULES = ("merge_linear_separable", "merge_separable")
TRAININGS = {"distillation": "distillation", "labels": "training with labels"}


@dataclass(frozen=True)
class Row:
    """One network of the table.

    Attributes:
        name: What was done.
        score: On all evaluation images.
        loss: What it was trained by; None: it was not.
        control: Whether it lacks the rewrite.
    """

    name: str
    score: Score
    loss: str | None = None
    control: bool = False


@dataclass(frozen=True)
class Table:
    """The rows, and what they are relative to."""

    step: Step
    float: float | None
    macs: int
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()

    def relative(self, value: float | None) -> float | None:
        """A metric relative to that of the float network = 100."""
        return None if value is None or not self.float else 100 * value / self.float

    def to_dict(self) -> dict[str, Any]:
        """The content of ``table.json``."""
        return {
            "step": str(self.step),
            "float": self.float,
            "macs": self.macs,
            "left_out": list(self.left_out),
            "rows": [self._row(r) for r in self.rows],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        s = row.score
        return {
            "row": row.name,
            "plan": s.plan,
            "loss": row.loss,
            "control": row.control,
            "macs": s.macs,
            "float": s.metric_float,
            "int8": s.metric,
            "int8_interval": None if s.interval is None else list(s.interval),
            "damage": s.damage,
            "engine": s.engine,
            "samples": s.samples,
            "error": s.error,
            "relative": {
                "float": self.relative(s.metric_float),
                "int8": self.relative(s.metric),
                "macs": 100 * s.macs_ratio,
            },
        }


def first_separable(gm: fx.GraphModule) -> Step:
    """The rewrite of the first depthwise separable convolution, in the order of the graph.

    Raises:
        RewriteError: there is none that can be replaced.
    """
    sites = [s for s in find_sites(gm) if s.rule in RULES]
    order = {n.name: i for i, n in enumerate(gm.graph.nodes)}
    free = sorted((s for s in sites if not s.blocked), key=lambda s: order[s.nodes[0]])
    if not free:
        near = next((f"{s.nodes[0]}: {s.blocked}" for s in sites), "it has no depthwise layer")
        raise RewriteError(f"table: no depthwise separable convolution can be replaced: {near}")
    return Step.at(free[0])


def make_table(
    job: Job, progress: Progress = silent, on_row: Callable[[Table], None] = lambda table: None
) -> Table:
    """Score every row; those known from an earlier call are not made again.

    Args:
        job: The run; its config's ``finetune`` section is the recipe of both trainings.
        progress: Shows each training.
        on_row: Called after each row with the table so far.
    """
    step = first_separable(job.gm)
    empty, replaced = Plan(()), Plan((step,))
    base = job.evaluator.baseline()
    table = Table(step, base.float, base.macs, ())

    def add(name: str, score: Score, loss: str | None = None, *, control: bool = False) -> None:
        nonlocal table
        row = Row(name, score, loss, control)
        table = replace(table, rows=(*table.rows, row))
        write_table(job, table)
        on_row(table)

    add("as it is", job.evaluator.score(empty, "whole"))
    first = job.evaluator.score(replaced, "whole")
    if first.error is not None:
        raise RewriteError(f"table: {step}: {first.error}")
    add("replaced", first)
    remedies = Plan(tuple(Step(rule, "model") for _, rule in REMEDIES))
    both = Plan((*replaced.steps, *remedies.steps))
    add("replaced + free rewrites", job.evaluator.score(both, "whole"))
    add("control: free rewrites", job.evaluator.score(remedies, "whole"), control=True)
    tuners = dict[str, Finetuner]()
    for loss in TRAININGS:
        why = _unusable(job, loss)
        if why:
            table = replace(table, left_out=(*table.left_out, f"{TRAININGS[loss]}: {why}"))
        else:
            options = job.cfg.finetune.model_copy(update={"loss": loss})
            tuners[loss] = Finetuner(job, FinetuneConfig.model_validate(options.model_dump()))
    for loss, tuner in tuners.items():
        score, _ = tuner.score(replaced, progress)
        add(f"replaced + {TRAININGS[loss]}", score, loss)
        score, _ = tuner.score(empty, progress)
        add(f"control: {TRAININGS[loss]}", score, loss, control=True)
    return table


def _unusable(job: Job, loss: str) -> str:
    """Why a loss cannot be used; "" where it can."""
    if loss != "labels":
        return ""
    if isinstance(job.evaluator.task, Detection):
        return "a detector's loss is not known"
    return "" if has_labels(job.cfg, job.data) else "the training data have no labels"


def write_table(job: Job, table: Table) -> Path:
    """Write ``table.json``."""
    path = job.folder / "table.json"
    task = job.evaluator.task
    about = {
        "format": 1,
        "config": job.cfg.path.name,
        "target": job.cfg.target,
        "metric": task.metric,
        "samples": job.evaluator.samples.count,
        "finetune": job.cfg.finetune.model_dump(exclude={"loss", "plans"}),
    }
    write_json(path, {**about, **table.to_dict()})
    return path
