"""The ladder of free remedies inside a search that can stop and resume after any plan.

``rewriter.ladder.climb`` decides each rung by the score of those before it. Here it is replayed on the scores that are known; the first
one that is not is the plan to score next.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from rewriter.ladder import Rung, Splits, best, climb
from rewriter.plan import Plan
from search.run_dir.scores import Score


class _UnknownError(Exception):
    def __init__(self, plan: Plan) -> None:
        super().__init__(str(plan))
        self.plan = plan


def rungs(
    gm: fx.GraphModule,
    scores: Mapping[str, Score],
    splits: Splits = (),
    max_latency_ratio: float | None = None,
) -> tuple[Rung, ...] | Plan:
    """The whole ladder where every rung is scored, else the plan that is to be scored next.

    Args:
        gm: Profiled canonical graph.
        scores: By plan text; a failed plan counts as a rung that does not help.
        splits: Rungs that split layers.
        max_latency_ratio: Longest time of a rung's file, relative to plain int8; None: any.
    """

    def known(plan: Plan) -> Score:
        if str(plan) not in scores:
            raise _UnknownError(plan)
        return scores[str(plan)]

    try:
        return climb(gm, known, splits=splits, max_latency_ratio=max_latency_ratio)
    except _UnknownError as missing:
        return missing.plan


def climbed(
    gm: fx.GraphModule,
    scores: Mapping[str, Score],
    splits: Splits = (),
    max_latency_ratio: float | None = None,
) -> tuple[Rung, ...]:
    """The rungs that are scored; one that is not is passed over as one that does not help."""

    def known(plan: Plan) -> Score:
        return scores.get(str(plan), Score(str(plan), macs=0))

    found = climb(gm, known, splits=splits, max_latency_ratio=max_latency_ratio)
    tried = {r.plan: r for r in reversed(found) if not r.note and str(r.plan) in scores}
    return tuple(r for r in found if tried.get(r.plan) is r)


def start(ladder: tuple[Rung, ...]) -> Plan:
    """The best rung's plan: what every costly rewrite has to gain on top of."""
    return best(ladder).plan
