"""Which step of a plan makes its file slow."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rewriter import Plan, RewriteError, Step
from search.latency.price import price_of_plan
from search.run_dir.scores import Score
from search.scoring.bench import FEW
from search.scoring.evaluator import RewriteEvaluator

log = logging.getLogger(__name__)


def slowest_step(evaluator: RewriteEvaluator, plan: Plan) -> tuple[Step, float] | None:
    """The step without which a plan's file is fastest, and the time that is then left, relative to plain int8.

    None without a table of kernels, or where no plan of the other steps can be carried out.
    """
    table, plain = evaluator.table, evaluator.plain_ms()
    if table is None or plain is None:
        return None
    few = evaluator.calibration[0][:FEW]
    left: dict[Step, float] = {}
    for step in plan.steps:
        rest = Plan(tuple(s for s in plan.steps if s != step))
        try:
            price = price_of_plan(evaluator.gm, rest, evaluator.scheme, few, table)
        except RewriteError:
            continue
        left[step] = price.milliseconds / plain
    if not left:
        return None
    step = min(left, key=lambda s: left[s])
    return step, left[step]


def too_slow(scores: Sequence[Score], best: Score, most: float | None) -> Score | None:
    """The plan with the least damage that only its time keeps from being better than the best; None: there is none."""
    found = [
        s
        for s in scores
        if most is not None
        and s.error is None
        and not s.stopped
        and s.damage is not None
        and (s.latency_ratio or 0.0) > most
        and (best.damage is None or s.damage < best.damage)
    ]
    return min(found, key=lambda s: s.damage or 0.0, default=None)


def warn_of_slow_plan(
    evaluator: RewriteEvaluator, scores: Sequence[Score], best: Score, most: float | None
) -> None:
    """Say which step breaks the limit on time of a plan that would do less damage than the best."""
    lost = too_slow(scores, best, most)
    if lost is None:
        return
    found = slowest_step(evaluator, Plan.parse(lost.plan))
    why = "" if found is None else f": {found[0]} does it, {found[1]:.2f} times without it"
    log.warning(
        "a plan with damage %.4g is not on the front, since its file takes %.2f times as long as plain int8 "
        "(search.max_latency_ratio: %g)%s; plan %r",
        *(lost.damage, lost.latency_ratio, most, why, lost.plan),
    )
