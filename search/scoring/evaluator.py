"""From a plan to its score, once: scores live in the run directory under a fingerprint of all that they depend on.

The images are decoded once and the float outputs are computed once. Plans are chosen by their scores on the first samples;
the others are held back, to confirm what was chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from rewriter import Plan, cost
from rewriter.assemble import Assembled, prepare
from rewriter.errors import RewriteError
from search.data.evaluation_set import Tick
from search.run_dir.scores import Baseline, Confirmations, Records, Samples, Score
from search.scoring.bench import Bench
from search.scoring.child_process import LateError, LostError, apart
from search.scoring.failure import failed, to_be_tried_again
from search.scoring.measure import Part
from search.scoring.racing import Race

__all__ = ["RewriteEvaluator", "Tick"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RewriteEvaluator(Bench):
    """Scores plans of one network; it never changes: `dataclasses.replace` gives one with other settings.

    Attributes:
        confirmations: Where scores of chosen plans on all samples are kept, and how many of the
            samples choose. None: all samples choose, and none confirm.
        race: When a plan is given up early; None: never.
        limit_s: Seconds after which a plan is given up as one that cannot be scored; it then runs
            in a process of its own. None: here, for as long as it takes.
        plain: What scores the network as it is, where this one's networks are made otherwise.
    """

    confirmations: Confirmations | None = None
    race: Race | None = None
    limit_s: float | None = None
    plain: RewriteEvaluator | None = None

    @property
    def failures(self) -> Path | None:
        """The run directory, which keeps the traceback of each plan that failed."""
        return self.records.folder

    def __call__(self, plan: Plan) -> Score:
        """`score` on the samples that choose."""
        return self.score(plan)

    def score(
        self, plan: Plan, part: Literal["choosing", "whole"] = "choosing", *, race: bool = True
    ) -> Score:
        """The score of a plan, from the records where it is known.

        A plan that cannot be carried out or run is a score with an error, so that a search goes
        on without it.

        Args:
            plan: What to score.
            part: On the samples that choose, or on all; what it is on those held back is then
                stored beside it.
            race: Whether it may be given up early. Not: it is scored again where it was.

        Raises:
            ConfigError: the user's data set or metric fails.
            OSError: the disk is full.
        """
        kept = self.confirmations
        if part == "whole" and kept is not None:
            return self._confirmed(plan, kept)
        race = race and part == "choosing"
        known = self.records.get(str(plan))
        if known is not None and (race or not known.stopped) and not self._lacking(known):
            return known
        ((score, samples),) = self._elsewhere(plan, [self.choosing], self.race if race else None)
        self.records.add(score, samples)
        if score.error is not None:
            log.warning("plan %r: %s", score.plan, score.error)
        return score

    def _confirmed(self, plan: Plan, kept: Confirmations) -> Score:
        known = kept.whole.get(str(plan))
        if known is not None and str(plan) in kept.held and not self._lacking(known):
            return known
        count, (_, last) = self.samples.count, self.choosing
        parts = [(0, last), (last, count), (0, count)]
        chosen, held, whole = self._elsewhere(plan, parts, None)
        if str(plan) not in self.records:
            self.records.add(*chosen)
        kept.held.add(*held)
        kept.whole.add(*whole)
        return whole[0]

    @property
    def choosing(self) -> Part:
        """The samples that choose among plans."""
        kept = self.confirmations
        return 0, self.samples.count if kept is None else kept.chosen_on

    def _elsewhere(
        self, plan: Plan, parts: Sequence[Part], race: Race | None
    ) -> list[tuple[Score, Samples | None]]:
        """`measure`, in a process of its own where there is a time limit."""
        self.reference()  # before another process is made, which then has it too
        action = partial(self.measure, plan, parts, race)
        if self.limit_s is None:
            return action()
        # once, and not in each child
        self.measured.float_metric(self.choosing)
        self.plain_ms()
        cost(self.gm)
        if self.maker is None:
            prepare(self.gm, self.calibration, self.store, plan, self.scheme)
        try:
            return apart(action, self.limit_s)
        except LostError as cause:
            late = self.limit_s if isinstance(cause, LateError) else None
            known = self.unscored(plan, cost(self.gm).macs, late)
            return [(score, None) for score in failed(known, cause, parts, self.failures)]

    def _lacking(self, score: Score) -> bool:
        """Whether a score has no time where one is asked for, or failed for want of time that there is now."""
        untimed = self.timed and score.error is None and score.latency_ms is None
        return untimed or to_be_tried_again(score, self.limit_s)

    def made_by(self, maker: Callable[[Plan], Assembled], records: Records) -> RewriteEvaluator:
        """The same on all samples, for networks that are made otherwise and recorded elsewhere."""
        return replace(
            self,
            maker=maker,
            records=records,
            confirmations=None,
            race=None,
            limit_s=None,
            plain=self.plain or self,
        )

    def baseline(self) -> Baseline:
        """The network as it is, on all samples; the empty plan is scored where it is not yet.

        Raises:
            RewriteError: the network itself cannot be run in int8.
        """
        score = (self.plain or self).score(Plan(()), "whole")
        if score.error is not None:
            raise RewriteError(f"the network as it is cannot be scored: {score.error}")
        return Baseline.of(score)
