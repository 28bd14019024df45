"""What a run directory says: the front, what it is compared with, and what to do now."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np

from search.finetune.run import Finetuned, read_finetuned
from search.pareto.controls import controls, separable
from search.pareto.front import Cost, Front, best, cost_named, hypervolume, knee, select_front
from search.pareto.front_json import baseline_of, point
from search.pareto.limits import Limits
from search.pareto.plan_summary import Places
from search.pareto.step_effects import step_effects
from search.run_dir.files import RunError, write_json
from search.run_dir.scores import Baseline, Confirmations, Records, Score, fingerprint, read_run
from search.scoring.confirm import Confirmed, confirmed, confirmed_front
from search.scoring.deployed import Deployed, confirmed_on, read_deployed
from search.sensitivity.run import Sensitivity, read_sensitivity

ABOUT = ("config", "metric", "higher_is_better", "target", "engine", "samples")
NEEDED = ("parts", "baseline", "objective", "limits", *ABOUT)


@dataclass(frozen=True)
class Results:
    """The state of a run, finished or not.

    Attributes:
        facts: What ``run.json`` says: config, task, metric, target, engine, samples, versions.
        limits: What a plan on the front must meet; None where there is no limit.
        front: The best plans within the limits, on all images once they are confirmed.
        chosen: The same on the images that choose among plans.
        references: The empty plan and the most harmful layers left in float, one more at a time.
        scores: Every plan scored, in that order, on the images that choose; failed and stopped ones too.
        confirmed: Plans that were run on the images held back, by text.
        held_back: How many images are held back.
        finetuned: Plans that were fine-tuned, by text.
        deployed: What runtimes that ship the target, but did not score the run, measured: by plan and engine.
        separable: How many points of the front differ from the one before beyond the noise.
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
    chosen: Front = field(default_factory=lambda: Front(()))
    confirmed: Mapping[str, Confirmed] = field(default_factory=dict[str, Confirmed])
    held_back: int = 0
    finetuned: Mapping[str, Finetuned] = field(default_factory=dict[str, Finetuned])
    deployed: Deployed = field(default_factory=dict[str, "dict[str, dict[str, Any]]"])
    separable: int = 0

    @property
    def metric(self) -> str:
        return str(self.facts["metric"])

    @property
    def cost(self) -> Cost:
        return self.facts.get("options", {}).get("cost", "macs")

    @property
    def places(self) -> Places:
        """The network's layers in running order, by which plans are put into words."""
        return self.facts.get("places") or {}

    @property
    def samples(self) -> int:
        if self.held_back and not self.is_confirmed:
            return int(self.facts["samples"]) - self.held_back
        return int(self.facts["samples"])

    @property
    def is_confirmed(self) -> bool:
        """Whether images are held back, and every plan of the front was run on them."""
        return bool(self.held_back) and all(s.plan in self.confirmed for s in self.chosen.all())

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
        price = cost_named(self.cost)
        macs = np.array([price(s) for s in points])
        value = np.array([self._quality(s) for s in points])
        ideal = 0.0
        if self.objective == "metric" and self.baseline.float is not None:
            ideal = self.baseline.float if self.higher_is_better else -self.baseline.float
        spare = (self.limits.get("macs") or 0.0) - self.baseline.macs
        if self.cost != "macs":
            spare = 0.0
        lost = ideal - self._quality_of_empty()
        extent = (spare, lost) if spare > 0 and lost > 0 else None
        return points[knee(macs, value, extent)]

    def picked(self, which: str) -> Score:
        """The score of a plan, or of ``best``, ``knee``, ``plain`` (no step), ``macs<=0.85`` or ``2`` (in the table).

        Raises:
            RunError: no such plan was scored, or it failed.
        """
        if which in ("best", "knee"):
            if not self.front.points:
                raise RunError(f"{self.folder}: no plan is scored yet")
            return self.best() if which == "best" else self.knee()
        if bound := re.fullmatch(r"macs\s*<=\s*(\d*\.?\d+)", which.strip()):
            return self._within(float(bound[1]))
        if "<=" in which:
            raise RunError(f"pick {which!r}: must be macs<=RATIO, such as macs<=0.85")
        if which.strip().isdigit():
            return self._numbered(int(which))
        text = "" if which == "plain" else " ".join(sorted(which.split()))
        for score in self.scores:
            if " ".join(sorted(score.plan.split())) == text:
                if score.error is not None:
                    raise RunError(f"plan {which!r}: could not be scored: {score.error}")
                known = self.confirmed.get(score.plan)
                return score if known is None else known.whole
        count = len(self.scores)
        raise RunError(f"plan {which!r}: not among the {count} plans scored in {self.folder}")

    def _within(self, ratio: float) -> Score:
        """The best plan of the front at no more than a ratio of the MACs."""
        points = [s for s in self.front.all() if s.macs_ratio <= ratio]
        if not points:
            least = min((s.macs_ratio for s in self.front.all()), default=1.0)
            raise RunError(f"macs<={ratio:g}: the cheapest plan of the front has {least:.3f}")
        up = self.higher_is_better
        return best(Front(tuple(points)), objective=self.objective, higher_is_better=up)

    def _numbered(self, number: int) -> Score:
        """The plan with a number of the front's table, counted from 1."""
        shown = self.front.all()
        if not 1 <= number <= len(shown):
            raise RunError(f"pick {number}: {self.folder}: the front has {len(shown)} plans")
        return shown[number - 1]

    def within_limits(self, score: Score) -> bool:
        """Whether a plan may be on the front; the empty one always may."""
        return not score.plan or Limits.of(self.limits).meets(score)

    def drop(self, score: Score) -> float | None:
        """Loss against float in points of the metric; negative where int8 is better."""
        original = self.baseline.float if score.original is None else score.original
        if original is None or score.metric is None:
            return None
        lost = original - score.metric
        return 100 * (lost if self.higher_is_better else -lost)

    def cheapest(self, max_drop: float | None, max_macs: float) -> Score | None:
        """`meeting`, its first plan."""
        return next(iter(self.meeting(max_drop, max_macs)), None)

    def meeting(
        self, max_drop: float | None, max_macs: float, max_damage: float | None = None
    ) -> list[Score]:
        """The plans that lose at most so many points at so many times the MACs, cheapest first.

        A goal that is None counts as met. Of plans with equal cost the one with fewer float layers
        comes first, then the one with less damage. A plan that is confirmed counts with its
        numbers on all images.
        """
        price = cost_named(self.cost)
        everything = [
            self.confirmed[s.plan].whole if s.plan in self.confirmed else s for s in self.scores
        ]
        found = [
            s
            for s in everything
            if s.error is None
            and not s.stopped
            and Limits.of(self.limits).meets(s)
            and s.macs_ratio <= max_macs
            and _at_most(self.drop(s), max_drop)
            and _at_most(s.damage, max_damage)
        ]
        return sorted(found, key=lambda s: (price(s), s.float_layers, s.damage or 0.0))

    def front_dict(self) -> dict[str, Any]:
        """The content of ``front.json``."""
        control = {c["plan"]: c for c in controls(self.scores)}
        alone = [s for s in self.scores if s.plan in control]
        corner = (self._dearest(), self._quality_of_empty())
        return {
            "format": 1,
            "target": self.facts["target"],
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "objective": self.objective,
            "samples": self.samples,
            "selection_samples": int(self.facts["samples"]) - self.held_back,
            "confirmed": self.is_confirmed,
            "cost": self.cost,
            "engine": self.facts["engine"],
            "baseline": baseline_of(self.baseline),
            "limits": dict(self.limits),
            "points": [self.point_dict(s) for s in self.front.points],
            "ties": [self.point_dict(s) for s in self.front.ties],
            "overtaken": [s.plan for s in self.overtaken()],
            "references": [self.point_dict(s) for s in self.references],
            "control": list(control.values()),
            "separable": self.separable,
            "best": self.best().plan if self.front.points else None,
            "knee": self.knee().plan if self.front.points else None,
            "hypervolume": self._hypervolume(self.front.points, corner),
            "control_hypervolume": self._hypervolume(alone, corner),
            "hypervolume_reference": list(corner),
            "plans_scored": len(self.scores),
            "plans_failed": sum(s.error is not None for s in self.scores),
            "failures": self.failures(),
            "plans_stopped": sum(s.stopped for s in self.scores),
        }

    def failures(self) -> dict[str, int]:
        """How many plans failed, by the kind of what went wrong, most frequent first."""
        kinds = Counter(s.error_kind or "unknown" for s in self.scores if s.error is not None)
        return dict(kinds.most_common())

    def overtaken(self) -> list[Score]:
        """Plans that were on the front on the images that chose, but are not on all images."""
        left = {s.plan for s in self.front.all()}
        return [self.confirmed[s.plan].whole for s in self.chosen.all() if s.plan not in left]

    def point_dict(self, score: Score) -> dict[str, Any]:
        known, tuned = self.confirmed.get(score.plan), self.finetuned.get(score.plan)
        more: dict[str, Any] = {} if tuned is None else {"finetuned": tuned.to_dict()}
        more["steps"] = [e.to_dict() for e in step_effects(score.plan, self.scores)]
        more["confirmed"] = confirmed_on(score, self.facts["target"], self.deployed)
        return point(score, self.places) | ({} if known is None else known.to_dict()) | more

    def _hypervolume(self, scores: Sequence[Score], corner: tuple[float, float]) -> float:
        macs = np.array([cost_named(self.cost)(s) for s in scores])
        return hypervolume(macs, np.array([self._quality(s) for s in scores]), corner)

    def _dearest(self) -> float:
        """The cost beyond which a plan adds nothing to the hypervolume."""
        if self.cost != "macs":
            price = cost_named(self.cost)
            plain = next((price(s) for s in self.scores if not s.plan), 0.0)
            limit = self.limits.get("latency_ms") if self.cost == "latency" else None
            return limit or (1.15 * plain if isfinite(plain) else 0.0)
        return self.limits.get("macs") or 1.15 * self.baseline.macs

    def _quality(self, score: Score) -> float:
        if self.objective == "damage" or score.metric is None:
            # an infinite damage is stored as none
            return -inf if score.damage is None else -score.damage
        return score.metric if self.higher_is_better else -score.metric

    def _quality_of_empty(self) -> float:
        """The quality of plain int8, which every front has to beat; where it is infinitely bad, that of the worst plan."""
        usable = [s for s in self.scores if s.error is None and not s.stopped]
        scale = [q for s in usable if isfinite(q := self._quality(s))]
        empty = self.empty()
        own = -inf if empty is None or empty.error is not None else self._quality(empty)
        return own if isfinite(own) else min(scale, default=0.0)

    def empty(self) -> Score | None:
        """Plain int8, on the images that the front is of."""
        if self.is_confirmed and "" in self.confirmed:
            return self.confirmed[""].whole
        return next((s for s in self.scores if not s.plan), None)


def load_results(folder: Path) -> Results:
    """Read a run directory; nothing is computed with the network.

    Raises:
        RunError: the folder is no run directory, or no plan is scored in it.
    """
    facts = read_run(folder)
    missing = [key for key in NEEDED if facts.get(key) is None]
    if missing:
        raise RunError(
            f"{folder}: no plan is scored yet (run.json has no {missing[0]}): "
            f"quantfix run {facts.get('config', 'CONFIG')}"
        )
    records = Records(folder, fingerprint(facts["parts"]))
    if not len(records):
        raise RunError(
            f"{folder}: no plan is scored yet that can be read: quantfix run {facts['config']}"
        )
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
    count = int(facts["samples"])
    selection = int(facts.get("selection_samples", count))
    kept = Confirmations.of(records, selection) if selection < count else None
    known = {} if kept is None else confirmed(records, kept)
    results = Results(
        folder=folder,
        facts=facts,
        objective=facts["objective"],
        baseline=baseline,
        limits=limits,
        front=Front(()),
        references=(),
        scores=scores,
        sensitivity=sensitivity,
        confirmed=known,
        deployed=read_deployed(folder, records.fingerprint),
        held_back=count - selection,
    )
    options: dict[str, Any] = {
        "objective": results.objective,
        "higher_is_better": results.higher_is_better,
        "cost": results.cost,
    }
    chosen = select_front(
        [s for s in scores if results.within_limits(s)], records.samples, **options
    )
    front = chosen
    if kept is not None:
        front = confirmed_front(chosen, known, kept, **options) or chosen
    shown = [known[s.plan].whole if s.plan in known else s for s in scores]
    references = _references(shown, sensitivity)
    tuned = read_finetuned(records, facts, {s.plan: s for s in shown})
    on = kept.whole if kept is not None and front is not chosen else records
    differ = separable(front.points, on.samples, results.objective)
    shown_too = replace(results, references=references, finetuned=tuned, separable=differ)
    return replace(shown_too, chosen=chosen, front=front)


def write_front(results: Results) -> None:
    """Write ``front.json``."""
    write_json(results.folder / "front.json", results.front_dict())


def _references(scores: Sequence[Score], sensitivity: Sensitivity | None) -> tuple[Score, ...]:
    """The empty plan, and the first layers of the ranking in float, as far as they are scored."""
    ranked = [] if sensitivity is None else [f"keep_float@{d.node}" for d in sensitivity.layers]
    curve = [" ".join(sorted(ranked[:n])) for n in range(len(ranked) + 1)]
    known = {s.plan: s for s in scores if s.error is None}
    return tuple(known[plan] for plan in curve if plan in known)


def _at_most(value: float | None, bound: float | None) -> bool:
    return bound is None or (value is not None and value <= bound)
