"""Confirming what was chosen on images that had no part in the choice.

The best of many plans is partly the luckiest one: on the images that chose it, it looks better
than it is. Where images are held back, the plans of the front are run on them at the end; the
front then shows each plan on all images, and what it is on either part.

Source: Cawley and Talbot 2010, On Over-fitting in Model Selection (JMLR 11), section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewriter.plan import Plan
from search.data.evaluation_set import Tick
from search.pareto.front import Front, select_front
from search.run_dir.scores import Confirmations, Records, Score
from search.scoring.evaluator import RewriteEvaluator


@dataclass(frozen=True)
class Confirmed:
    """A plan on the images that chose it, on those held back, and on all of them."""

    selection: Score
    held: Score
    whole: Score

    def luck(self, higher_is_better: bool = True) -> float | None:
        """How much better the metric is on the images that chose, against float on each part.

        In points; None without labels. One plan's luck is mostly noise: its standard error is
        that of a difference of two small samples.
        """
        parts = (self.selection, self.held)
        gains = [
            score.metric - score.original
            for score in parts
            if score.metric is not None and score.original is not None
        ]
        if len(gains) < 2:
            return None
        return 100 * (gains[0] - gains[1]) * (1 if higher_is_better else -1)

    def to_dict(self) -> dict[str, Any]:
        """``selection`` and ``confirmation`` of a point in ``front.json``."""
        return {"selection": part_dict(self.selection), "confirmation": part_dict(self.held)}


def part_dict(score: Score) -> dict[str, Any]:
    """What a plan measured on a part of the images."""
    return {
        "samples": score.samples,
        "float": score.original,
        "int8": score.metric,
        "int8_interval": None if score.interval is None else list(score.interval),
        "damage": score.damage,
    }


def confirm(
    evaluator: RewriteEvaluator,
    plans: Sequence[str],
    tick: Tick = lambda done, total: None,
) -> list[Score]:
    """Scores of plans on all images; those known already are not run again."""
    found: list[Score] = []
    for plan in plans:
        tick(len(found), len(plans))
        found.append(evaluator.score(Plan.parse(plan), "whole"))
    tick(len(found), len(plans))
    return found


def confirmed(records: Records, kept: Confirmations) -> dict[str, Confirmed]:
    """What is confirmed in a run directory, by plan; plans that failed are left out."""
    found: dict[str, Confirmed] = {}
    for whole in kept.whole.scores():
        selection, held = records.get(whole.plan), kept.held.get(whole.plan)
        if selection is None or held is None or any(s.error for s in (selection, held, whole)):
            continue
        found[whole.plan] = Confirmed(selection, held, whole)
    return found


def confirmed_front(
    chosen: Front, known: Mapping[str, Confirmed], kept: Confirmations, **options: Any
) -> Front | None:
    """The chosen front on all images; None where a plan of it is not confirmed yet.

    No plan comes in that was not chosen, but one that others beat on all images goes out.
    """
    plans = [s.plan for s in chosen.all()]
    if any(plan not in known for plan in plans):
        return None
    return select_front([known[p].whole for p in plans], kept.whole.samples, **options)
