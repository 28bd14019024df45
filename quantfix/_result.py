"""What a run has found: a Pareto front, its points, and the int8 file of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter import Plan
from search.config.schema import ConfigError
from search.engines import EngineError
from search.export.forms import checked_forms, export_forms
from search.export.ship import ship
from search.export.trained import architecture, with_weights
from search.job import Job, Progress, silent
from search.report.notebook import NotebookResults, NotebookSensitivity, shown
from search.report.verdict import advice
from search.results import Results
from search.run_dir.scores import Score

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True)
class Point:
    """One plan, and what was measured of it.

    Attributes:
        plan: Its steps as text; empty for the network as it is.
        macs: Multiply-accumulates for one input; `macs_ratio` is relative to the network as it is.
        int8: The task's metric of the int8 network; None without labels.
        interval: 95 % interval of `int8`, paired with the float network on the same samples.
        float: The metric of the rewritten network in float.
        damage: Distance of the int8 outputs from those of the float network, lower is better.
        float_layers: Layers that stay in float.
        facts: All that ``front.json`` says of it.
    """

    plan: str
    macs: int
    macs_ratio: float
    int8: float | None
    interval: tuple[float, float] | None
    float: float | None
    damage: float | None
    float_layers: int
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)

    def __str__(self) -> str:
        return self.plan

    def __getattr__(self, name: str) -> Any:
        """Further facts, such as ``latency_ms``."""
        facts = self.__dict__.get("facts", {})
        if name.startswith("_") or name not in facts:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return facts[name]


class Result:
    """A run, finished or as far as it came; it shows itself in a notebook.

    Attributes:
        folder: The run directory; ``report.html`` there has all of this and more.
        chosen: What `fix` chose; None for other runs.
        met: Whether that meets what was asked for.
    """

    def __init__(
        self,
        job: Job,
        results: Results,
        progress: Progress = silent,
        chosen: Score | None = None,
        met: bool | None = None,
    ) -> None:
        self._job, self._progress = job, progress
        self._results: NotebookResults = shown(results)
        self._chosen = chosen
        self.folder: Path = results.folder
        self.chosen: Point | None = None if chosen is None else self._point(chosen)
        self.met = met

    @property
    def front(self) -> list[Point]:
        """The best plans within the limits, cheapest first; none of them beats another in both MACs and quality."""
        return [self._point(s) for s in self._results.front.points]

    @property
    def baseline(self) -> Mapping[str, Any]:
        """The network as it is: ``float``, ``int8``, ``macs``, ``damage``."""
        return self._results.front_dict()["baseline"]

    @property
    def sensitivity(self) -> NotebookSensitivity:
        """Which layers int8 breaks, and why."""
        found = self._results.sensitivity
        assert isinstance(found, NotebookSensitivity)  # a run has analyzed before it scores
        return found

    def best(self) -> Point:
        """The plan with the best int8 quality within the limits."""
        return self._point(self._results.best())

    def pick(self, text: str) -> Point:
        """One plan.

        Args:
            text: ``best``, ``knee`` (after which more compute buys little), ``plain`` (int8 without any step),
                ``macs<=0.85`` (the best that costs no more), ``2`` (its number in the front's table), or a plan.

        Raises:
            RunError: no such plan was scored, or it failed.
        """
        return self._point(self._results.picked(text))

    def plot(self) -> Any:
        """The front as an interactive ``plotly.graph_objects.Figure``."""
        return self._results.plot()

    def advice(self) -> str:
        """What to do now, in one sentence."""
        return advice(self._results)

    def export(
        self,
        folder: str | Path,
        pick: str | Point | None = None,
        to: Sequence[str] = ("onnx",),
        *,
        weights: str | Path | Mapping[str, Any] | None = None,
    ) -> Point:
        """Write ``model_int8.onnx``, the rewritten float network as source and weights, and what changed.

        Args:
            folder: Made when missing; files of an earlier export are replaced.
            pick: Which plan, see `pick`. None: what `fix` chose, else the best.
            to: Forms of the int8 file: ``onnx``, ``tflite``, ``openvino``, ``trt``; each is run as it was written.
            weights: Trained weights of what `rewrite` returned for this plan: a safetensors file or a state dict.

        Returns:
            The plan, with what the written file measured.

        Raises:
            ConfigError: an unknown form, or weights that do not fit.
            RewriteError: the plan cannot be carried out.
        """
        try:
            wanted = checked_forms(tuple(to))
        except EngineError as error:
            raise ConfigError(str(error)) from error
        score = self._score(pick)
        job = self._job if weights is None else with_weights(self._job, score.plan, weights)
        with self._progress("writing and measuring the file") as tick:
            tick(0, 1)
            shipped = ship(job, score, Path(folder))
            if set(wanted) - {"onnx"}:
                export_forms(job.evaluator, Plan.parse(score.plan), Path(folder), wanted)
            tick(1, 1)
        return self._point(shipped.exported.score)

    def rewrite(
        self, pick: str | Point | None = None, *, keep_batch_norm: bool = True
    ) -> fx.GraphModule:
        """The rewritten architecture of a plan, trainable; see `quantfix.rewrite`. Its weights go back into `export`."""
        return architecture(self._job, self._score(pick).plan, keep_batch_norm)

    def _score(self, pick: str | Point | None) -> Score:
        if pick is None:
            return self._chosen or self._results.best()
        return self._results.picked(pick.plan or "plain" if isinstance(pick, Point) else pick)

    def _point(self, score: Score) -> Point:
        facts = self._results.point_dict(score)
        interval = facts["int8_interval"]
        return Point(
            plan=score.plan,
            macs=score.macs,
            macs_ratio=score.macs_ratio,
            int8=facts["int8"],
            interval=None if interval is None else (interval[0], interval[1]),
            float=facts["float"],
            damage=facts["damage"],
            float_layers=score.float_layers,
            facts=facts,
        )

    def _repr_html_(self) -> str:
        return self._results._repr_html_()  # pyright: ignore[reportPrivateUsage]

    def __repr__(self) -> str:
        if not self._results.front.points:
            return f"<Result {self.folder}: no plan is scored yet>"
        return f"<Result {self.folder}: {len(self.front)} points; {self.advice()}>"
