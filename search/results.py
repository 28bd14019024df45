"""What a run directory says: the front, what it is compared with, and what to do now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from search.analysis import Sensitivity, read_sensitivity
from search.front import Front, best, hypervolume, knee, select_front
from search.records import Baseline, Records, RunError, Score, fingerprint, read_json, write_json


@dataclass(frozen=True)
class Results:
    """The state of a run, finished or not.

    Attributes:
        facts: What ``run.json`` says: config, task, metric, target, engine, samples, versions.
        limits: Largest ``macs`` and ``float_layers`` of a plan on the front; None where there is
            no limit.
        front: The best plans within the limits.
        references: The empty plan and the most harmful layers left in float, one more at a time.
        scores: Every plan that was scored, in that order; failed ones too.
    """

    folder: Path
    facts: Mapping[str, Any]
    objective: str
    baseline: Baseline
    limits: Mapping[str, float | None]
    front: Front
    references: tuple[Score, ...]
    scores: tuple[Score, ...]
    sensitivity: Sensitivity | None

    @property
    def metric(self) -> str:
        return str(self.facts["metric"])

    @property
    def higher_is_better(self) -> bool:
        return bool(self.facts["higher_is_better"])

    def best(self) -> Score:
        """The plan with the best int8 quality within the limits."""
        return best(self.front, objective=self.objective, higher_is_better=self.higher_is_better)

    def knee(self) -> Score:
        """The point of the front after which more compute buys little.

        All that int8 loses weighs as much as all the compute that the limits allow.
        """
        points = self.front.points
        macs = np.array([float(s.macs) for s in points])
        value = np.array([self._quality(s) for s in points])
        ideal = 0.0
        if self.objective == "metric" and self.baseline.float is not None:
            ideal = self.baseline.float if self.higher_is_better else -self.baseline.float
        spare = (self.limits.get("macs") or 0.0) - self.baseline.macs
        lost = ideal - self._quality_of_empty()
        extent = (spare, lost) if spare > 0 and lost > 0 else None
        return points[knee(macs, value, extent)]

    def picked(self, which: str) -> Score:
        """The score of ``best``, ``knee``, or of a plan's text.

        Raises:
            RunError: no such plan was scored, or it failed.
        """
        if which in ("best", "knee"):
            if not self.front.points:
                raise RunError(
                    f"{self.folder}: no plan is scored yet: quantfix run {self.facts['config']}"
                )
            return self.best() if which == "best" else self.knee()
        text = " ".join(sorted(which.split()))
        for score in self.scores:
            if " ".join(sorted(score.plan.split())) == text:
                if score.error is not None:
                    raise RunError(f"plan {which!r}: could not be scored: {score.error}")
                return score
        raise RunError(
            f"plan {which!r}: not among the {len(self.scores)} plans scored in {self.folder}"
        )

    def within_limits(self, score: Score) -> bool:
        macs, floats = self.limits.get("macs"), self.limits.get("float_layers")
        return not score.plan or (
            (macs is None or score.macs <= macs)
            and (floats is None or score.float_layers <= floats)
        )

    def drop(self, score: Score) -> float | None:
        """Loss against float in points of the metric; negative where int8 is better."""
        if self.baseline.float is None or score.metric is None:
            return None
        lost = self.baseline.float - score.metric
        return 100 * (lost if self.higher_is_better else -lost)

    def cheapest(self, max_drop: float, max_macs: float) -> Score | None:
        """The cheapest plan that loses at most so many points at so many times the MACs.

        Of plans with equal MACs the one with fewer float layers, then the one with less damage.
        """
        meeting = [
            s
            for s in self.scores
            if s.error is None
            and self.within_limits(s)
            and s.macs_ratio <= max_macs
            and (drop := self.drop(s)) is not None
            and drop <= max_drop
        ]
        return min(meeting, key=lambda s: (s.macs, s.float_layers, s.damage or 0.0), default=None)

    def front_dict(self) -> dict[str, Any]:
        """The content of ``front.json``."""
        points = self.front.points
        quality = [self._quality(s) for s in points]
        macs = [float(s.macs) for s in points]
        corner = (self.limits.get("macs") or 1.15 * self.baseline.macs, self._quality_of_empty())
        return {
            "format": 1,
            "target": self.facts["target"],
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "objective": self.objective,
            "samples": self.facts["samples"],
            "engine": self.facts["engine"],
            "baseline": _baseline_dict(self.baseline),
            "limits": dict(self.limits),
            "points": [_point(s) for s in points],
            "ties": [_point(s) for s in self.front.ties],
            "references": [_point(s) for s in self.references],
            "best": self.best().plan if points else None,
            "knee": self.knee().plan if points else None,
            "hypervolume": hypervolume(np.array(macs), np.array(quality), corner),
            "hypervolume_reference": list(corner),
            "plans_scored": len(self.scores),
            "plans_failed": sum(s.error is not None for s in self.scores),
        }

    def advice(self) -> str:
        """What to do now, in one sentence."""
        best, empty = self.best(), next(s for s in self.scores if not s.plan)
        facts = self.facts
        on = f"on {facts['samples']} samples ({facts['engine']}, target {facts['target']})"
        if not best.plan:
            return (
                "Ship the network as it is: no rewrite within the limits beats plain int8, "
                f"{self._said(empty)} {on}."
            )
        cost = "no more compute" if best.macs_ratio <= 1 else f"{best.macs_ratio - 1:+.1%} MACs"
        kept = f" and {best.float_layers} layers in float" if best.float_layers else ""
        return (
            f'Apply "{best.plan}": {self._said(best)} with {cost}{kept}, where plain int8 has '
            f"{self._said(empty)}{self._float_said()}, {on}."
        )

    def _said(self, score: Score) -> str:
        if score.metric is None or self.objective == "damage":
            return f"damage {score.damage:.4g}"
        low, high = score.interval or (score.metric, score.metric)
        return f"{self.metric} {score.metric:.2%} [{low:.2%}, {high:.2%}]"

    def _float_said(self) -> str:
        return "" if self.baseline.float is None else f" and float {self.baseline.float:.2%}"

    def _quality(self, score: Score) -> float:
        if self.objective == "damage" or score.metric is None:
            return -(score.damage or 0.0)
        return score.metric if self.higher_is_better else -score.metric

    def _quality_of_empty(self) -> float:
        """The quality of plain int8, which every front has to beat."""
        return next((self._quality(s) for s in self.scores if not s.plan and s.error is None), 0.0)


def load_results(folder: Path) -> Results:
    """Read a run directory; nothing is computed with the network.

    Raises:
        RunError: the folder is no run directory, or no plan is scored in it.
    """
    facts = read_json(folder / "run.json")
    missing = [key for key in ("parts", "baseline", "objective", "limits") if key not in facts]
    if missing:
        raise RunError(
            f"{folder}: no plan is scored yet (run.json has no {missing[0]}): "
            f"quantfix run {facts.get('config', 'CONFIG')}"
        )
    records = Records(folder, fingerprint(facts["parts"]))
    return results_of(folder, facts, records)


def results_of(folder: Path, facts: Mapping[str, Any], records: Records) -> Results:
    """The results in `records`, with the facts of ``run.json``."""
    known = {f.name for f in fields(Baseline)}
    stored = {key: value for key, value in facts["baseline"].items() if key in known}
    if stored.get("interval") is not None:
        stored["interval"] = tuple(stored["interval"])
    baseline = Baseline(**stored)
    scores = tuple(records.scores())
    limits = facts["limits"]
    sensitivity = read_sensitivity(folder, records.fingerprint)
    results = Results(
        folder=folder,
        facts=facts,
        objective=facts["objective"],
        baseline=baseline,
        limits=limits,
        front=Front(()),
        references=_references(scores, sensitivity),
        scores=scores,
        sensitivity=sensitivity,
    )
    front = select_front(
        [s for s in scores if results.within_limits(s)],
        records.samples,
        objective=results.objective,
        higher_is_better=results.higher_is_better,
    )
    return replace(results, front=front)


def write_front(results: Results) -> None:
    """Write ``front.json``."""
    write_json(results.folder / "front.json", results.front_dict())


def _references(scores: Sequence[Score], sensitivity: Sensitivity | None) -> tuple[Score, ...]:
    """The empty plan, and the first layers of the ranking in float, as far as they are scored."""
    ranked = [] if sensitivity is None else [f"keep_float@{d.node}" for d in sensitivity.layers]
    curve = [" ".join(sorted(ranked[:n])) for n in range(len(ranked) + 1)]
    known = {s.plan: s for s in scores if s.error is None}
    return tuple(known[plan] for plan in curve if plan in known)


def _point(score: Score) -> dict[str, Any]:
    return {
        "plan": score.plan,
        "macs": score.macs,
        "macs_ratio": score.macs_ratio,
        "params": score.params,
        "weight_bytes": score.weight_bytes,
        "float_layers": score.float_layers,
        "int8": score.metric,
        "int8_interval": None if score.interval is None else list(score.interval),
        "float": score.metric_float,
        "damage": score.damage,
        "engine": score.engine,
        "samples": score.samples,
    }


def _baseline_dict(baseline: Baseline) -> dict[str, Any]:
    interval = None if baseline.interval is None else list(baseline.interval)
    return {
        "float": baseline.float,
        "int8": baseline.int8,
        "int8_interval": interval,
        "macs": baseline.macs,
        "damage": baseline.damage,
    }
