"""What every plan that costs less is compared with: smaller images, and the same amount taken everywhere; and how many points differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rewriter.plan import Plan, Step, rule_named
from search.pareto.front import Z95, metric_error
from search.run_dir.scores import Samples, Score

# Of the damage: what any two points differ by if nothing but noise is between them.
NOISE = 1.1
MIN_PLACES = 3  # places that are thinned alike


def controls(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The scored plans that save by one knob for the whole network alone, cheapest first."""
    saving = {s.plan: _saving(s.plan) for s in scores if has_one_knob(Plan.parse(s.plan))}
    # the same amount wherever it can be taken: of an amount the plan with the most places
    most: dict[str, int] = {}
    for steps in saving.values():
        most[steps[0].rule] = max(len(steps), most.get(steps[0].rule, 0))
    found: list[dict[str, Any]] = []
    for score in scores:
        steps = saving.get(score.plan, [])
        unusable = score.error is not None or score.stopped
        if not steps or unusable or len(steps) < most[steps[0].rule]:
            continue
        scales = rule_named(steps[0].rule).scales
        found.append(
            {
                "macs_ratio": score.macs_ratio,
                "int8": score.metric,
                "damage": score.damage,
                "how": "lower resolution" if scales else "uniform thinning",
                "plan": score.plan,
            }
        )
    return sorted(found, key=lambda c: (c["macs_ratio"], c["how"]))


def has_one_knob(plan: Plan) -> bool:
    """Whether a plan saves by one rule alone: by its share of all, or at several places alike."""
    steps = [s for s in plan.steps if rule_named(s.rule).saves]
    if len({s.rule for s in steps}) != 1:
        return False
    return rule_named(steps[0].rule).scales or len(steps) >= MIN_PLACES


def _saving(text: str) -> list[Step]:
    return [s for s in Plan.parse(text).steps if rule_named(s.rule).saves]


def separable(
    points: Sequence[Score], samples: Callable[[str], Samples | None], objective: str
) -> int:
    """How many points of a front differ from the one before them beyond the noise.

    In the metric, where the paired 95 % interval of the difference excludes zero; otherwise in the
    damage, by more than a tenth.

    Args:
        points: Cheapest first.
        samples: Values of each sample by plan text.
        objective: ``metric`` or ``damage``.
    """
    if not points:
        return 0
    error = metric_error([samples(s.plan) for s in points])
    kept = [0]
    for i in range(1, len(points)):
        a, b = points[kept[-1]], points[i]
        clear = False
        if objective == "metric" and a.metric is not None and b.metric is not None:
            clear = bool(np.abs(a.metric - b.metric) > Z95 * error[kept[-1], i])
        damages = sorted((a.damage or 0.0, b.damage or 0.0))
        if clear or damages[1] > NOISE * damages[0]:
            kept.append(i)
    return len(kept)
