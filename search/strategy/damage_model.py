"""What plans not scored yet will do, from those that are: a linear model refitted with each score.

A step is taken to multiply the damage by a factor of its own, so the logarithm of the damage is a
sum over the steps of a plan. What the single answers and the ranking of the layers said is the
prior; each further plan corrects the steps that it has, so that a step which gains nothing beside
others is not proposed with them again.

Source: Bishop 2006, Pattern Recognition and Machine Learning, section 3.3 (Bayesian linear
regression with known noise).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rewriter.plan import Plan, Step
from search.run_dir.scores import Score

NOISE = 0.1  # of the logarithm of a plan's damage: what steps do to each other's gain
DOUBT = 0.3  # share of a measured gain that it may differ by beside other steps
LEAST_DOUBT = 0.03


@dataclass(frozen=True)
class Gains:
    """How much each step takes off the logarithm of the damage, and how sure that is."""

    mean: Mapping[Step, float]
    deviation: Mapping[Step, float]

    def hoped(self) -> dict[Step, float]:
        """What the gains may well be; it is worth a plan to find out."""
        return {step: gain + self.deviation[step] for step, gain in self.mean.items()}


def refitted(
    gain: Mapping[Step, float],
    measured: frozenset[Step],
    base: Plan,
    scores: Mapping[str, Score],
) -> Gains:
    """The gains of steps on top of a plan, given all that is scored.

    Args:
        gain: What is believed of each step before any plan of several steps is scored.
        measured: The steps whose gain was measured on top of `base`; of others little is believed.
        base: Plan without the steps; only plans that have all of it count.
        scores: Of plans, by text; those that failed or were given up early do not count.
    """
    steps = sorted(gain, key=str)
    column = {step: i for i, step in enumerate(steps)}
    prior = np.array([gain[s] for s in steps])
    doubt = np.array([DOUBT if s in measured else 1.0 for s in steps])
    variance = (doubt * np.abs(prior) + LEAST_DOUBT) ** 2
    bottom = scores[str(base)].damage
    rows: list[list[float]] = []
    seen: list[float] = []
    for text in sorted(scores):
        score, plan = scores[text], Plan.parse(text)
        more = set(plan.steps) - set(base.steps)
        usable = score.error is None and not score.stopped and score.damage
        if not usable or not bottom or not set(base.steps) <= set(plan.steps):
            continue
        if not more or any(step not in column for step in more):
            continue
        row = [0.0] * len(steps)
        for step in more:
            row[column[step]] = 1.0
        rows.append(row)
        seen.append(-math.log(score.damage / bottom))  # type: ignore[operator]
    if not rows:
        return Gains(gain, {s: float(v) for s, v in zip(steps, np.sqrt(variance), strict=True)})
    x, y = np.array(rows), np.array(seen)
    # in the space of the plans, of which there are fewer than steps
    spread = x * variance
    inverse = np.linalg.inv(spread @ x.T + NOISE**2 * np.eye(len(y)))
    mean = prior + spread.T @ inverse @ (y - x @ prior)
    left = variance - np.einsum("ij,ik,kj->j", spread, inverse, spread)
    deviation = np.sqrt(np.maximum(left, 0.0))
    return Gains(
        {s: float(v) for s, v in zip(steps, mean, strict=True)},
        {s: float(v) for s, v in zip(steps, deviation, strict=True)},
    )
