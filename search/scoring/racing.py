"""Racing: a plan that cannot reach the front any more is given up before all samples are run.

All plans see the same samples in the same order, in blocks that double. After each block the plan
is compared, sample by sample, with the plans on the front that cost no more: what varies between
samples cancels in the differences.

Source: Maron and Moore 1994, Hoeffding Races; Birattari et al. 2002, A Racing Algorithm for
Configuring Metaheuristics (paired tests on blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rewriter.plan import Plan
from search.pareto.front import Z95
from search.run_dir.scores import Array, Samples, Score

# Up to some three looks at each of a handful of rivals: Bonferroni's share of 5 % is about 0.3 %.
SURE = 3.0
FIRST_BLOCK = 64  # samples in the first block
WORTH_IT = 4  # blocks of that size; with fewer samples nothing is stopped


@dataclass(frozen=True)
class Race:
    """When a plan is given up.

    Attributes:
        rivals: Gives the front of what is known, each score with its values on all samples.
        least: Samples in the first block; 0: no plan is given up.
        objective: ``metric`` or ``damage``.
        higher_is_better: Direction of the metric.
        spared: Says of a plan that others build on it, so that it is always scored in full.
        cost: What stands against quality.
    """

    rivals: Callable[[], Sequence[tuple[Score, Samples]]]
    least: int = FIRST_BLOCK
    objective: str = "metric"
    higher_is_better: bool = True
    spared: Callable[[Plan], bool] = lambda plan: False
    cost: Callable[[Score], float] = lambda score: score.macs

    def looks(self, plan: Plan, count: int) -> list[int]:
        """After how many of `count` samples to look, the last look being at all of them."""
        looks: list[int] = []
        if self.least and count >= WORTH_IT * self.least and not self.spared(plan):
            size = self.least
            while size <= count // 2:
                looks.append(size)
                size *= 2
        return [*looks, count]

    def lost(self, score: Score, samples: Samples, count: int) -> bool:
        """Whether a plan, seen on its first samples, will not be on the front of all `count`.

        Against some plan of the front that costs no more it must be sure that the plan does more
        damage, and that its metric will not turn out higher by more than the noise (see
        `search.pareto.front.compare`). A metric that is no mean over samples is never sure.
        """
        sign = 1.0 if self.higher_is_better else -1.0
        for rival, values in self.rivals():
            if rival.plan == score.plan or self.cost(rival) > self.cost(score):
                continue
            seen = len(samples.damage)
            low, _ = interval(samples.damage - values.damage[:seen])
            if low <= 0:
                continue
            if self.objective == "damage":
                return True
            if samples.metric is None or values.metric is None:
                continue
            gain = sign * (samples.metric - values.metric[:seen])
            # one sample of disagreement more, as in `search.pareto.front.metric_error`
            noise = Z95 * np.sqrt(np.var(gain) / count + 1 / count**2)
            if interval(gain)[1] < noise:
                return True
        return False


def interval(difference: Array, z: float = SURE) -> tuple[float, float]:
    """Of the mean of paired differences, (n,): z standard errors to either side."""
    n = len(difference)
    mean, error = float(difference.mean()), float(difference.std(ddof=1)) / np.sqrt(n)
    return mean - z * error, mean + z * error
