"""Plans for given budgets of compute: what to take away and what to spend, decided together.

A table says what each amount of thinning at each place saves and costs; what a rewrite that spends
gains on top of the best rung is added once it is measured. Under the additive model the best plan
for every budget at once comes from one dynamic program (``predicted_front``). Then the table is
corrected by what came out: a ridge regression of the plans' damages on their steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rewriter.fitting import Price
from rewriter.plan import Plan, Step, rule_named
from search.run_dir.scores import Score
from search.strategy.space import Space, predicted_front, saves

BUDGETS = (0.95, 0.90, 0.85, 0.80, 0.75, 0.70)
SPENDING = (1.0, 1.05, 1.10)
STEP = 0.05  # below the last of them
# Relative error of a price in the table, and of the damage of a plan beside other plans'.
DOUBT, NOISE = 0.5, 0.15
CONTROLS = 2  # plans that take the same amount everywhere


@dataclass
class Savings:
    """The plans that cost less than the network as it is.

    Attributes:
        space: Choices and costs.
        least: Budget that the last of them has to meet, as a ratio to the network as it is.
        most: The same of the first.
        ask: Measures the prices of the steps that save; asked once, when they are needed.
    """

    space: Space
    least: float
    most: float
    ask: Callable[[], Mapping[Step, Price]]
    _damage: Mapping[Step, float] | None = field(default=None, init=False)
    _found: dict[object, list[Plan]] = field(default_factory=dict[object, list[Plan]], init=False)

    def damage(self) -> Mapping[Step, float]:
        """What each step is predicted to add to the damage, by the table alone."""
        if self._damage is None:
            known = set(self.space.steps())
            self._damage = {s: p.damage for s, p in self.ask().items() if s in known}
        return self._damage

    def phases(self, base: Plan, scores: Mapping[str, Score]) -> Iterator[list[Plan]]:
        """Plans to score one lot after the other, on top of a plan: each budget's; controls; between the budgets.

        The later ones depend on the scores of the first lots only, so that they stay what they are
        while they are scored.
        """
        budgets = ratios(self.least, self.most)
        yield self._plans(base, self.damage(), budgets)
        yield [*uniform_plans(self.space, base)[:CONTROLS], *self._scaled(base).values()]
        better = self.corrected(base, scores)
        yield self._mixed(base, better, scores, between(budgets))
        yield self._mixed(base, better, scores, budgets)

    def _scaled(self, base: Plan) -> dict[Step, Plan]:
        """The control: each step that saves a share of all, alone."""
        steps = [s for s in self.space.steps() if rule_named(s.rule).scales]
        return {s: self.space.repair([*base.steps, s]) for s in steps}

    def _mixed(
        self,
        base: Plan,
        cost: Mapping[Step, float],
        scores: Mapping[str, Score],
        budgets: Sequence[float],
    ) -> list[Plan]:
        """For each budget the plan of least predicted damage, with or without a step that saves a share of all."""
        bottom = scores[str(base)].damage or 0.0
        found: list[Plan] = []
        for budget in budgets:
            tried = [(self._cost(p, base, cost), p) for p in self._plans(base, cost, [budget])]
            for step, plan in self._scaled(base).items():
                alone = scores[str(plan)].damage if str(plan) in scores else None
                share = 1 + self.space.extra_macs[step] / self.space.macs
                if alone is None or share <= budget:
                    continue  # of itself it saves more than is asked for
                for thin in self._plans(base, cost, [min(1.0, budget / share)]):
                    both = self.space.repair([*thin.steps, step])
                    tried.append((alone - bottom + self._cost(thin, base, cost), both))
            if tried:
                found.append(min(tried, key=lambda t: t[0])[1])
        return list(dict.fromkeys(found))

    def _cost(self, plan: Plan, base: Plan, cost: Mapping[Step, float]) -> float:
        return sum(cost.get(s, 0.0) for s in plan.steps if s not in base.steps)

    def corrected(self, base: Plan, scores: Mapping[str, Score]) -> dict[Step, float]:
        """The prices, corrected by the scores of the first lot."""
        first = self._plans(base, self.damage(), ratios(self.least, self.most))
        texts = [str(p) for p in (base, *first)]
        return corrected(self.damage(), base, {t: scores[t] for t in texts if t in scores})

    def with_spending(
        self, base: Plan, scores: Mapping[str, Score], gains: Mapping[Step, float]
    ) -> list[Plan]:
        """Plans that save in one place what they spend in another.

        Args:
            base: What they are on top of.
            scores: Of plans by text.
            gains: Damage that steps which spend take away, where they were measured on top of it.
        """
        useful = {s: -g for s, g in gains.items() if g > 0 and s not in base.steps}
        if not useful:  # nothing that costs MACs is worth what it saves
            return []
        spending = [r for r in SPENDING if r <= self.most + 1e-9]
        cost = {**self.corrected(base, scores), **useful}
        return self._plans(base, cost, [*spending, *ratios(self.least, self.most)])

    def _plans(
        self, base: Plan, cost: Mapping[Step, float], budgets: Sequence[float]
    ) -> list[Plan]:
        asked = (base, tuple(cost.items()), tuple(budgets))
        if asked not in self._found:
            self._found[asked] = plans_for(self.space, base, cost, budgets)
        return self._found[asked]


def ratios(least: float, most: float) -> list[float]:
    """Budgets below 1 in a range, largest first, each a ratio to the network as it is."""
    found = list(BUDGETS)
    while found[-1] - STEP > least - 1e-9:
        found.append(round(found[-1] - STEP, 4))
    found = [r for r in found if least - 1e-9 <= r <= most + 1e-9]
    if most < 1:
        found = [most, *found]
    return list(dict.fromkeys([*found, *([least] if least < min(found, default=1.0) else [])]))


def between(budgets: Sequence[float]) -> list[float]:
    """A budget in the middle of each two, and between the first and 1."""
    ends = [1.0, *budgets] if budgets and budgets[0] < 1 else list(budgets)
    return [round((a + b) / 2, 4) for a, b in itertools.pairwise(ends)]


def plans_for(
    space: Space,
    base: Plan,
    cost: Mapping[Step, float],
    budgets: Sequence[float],
) -> list[Plan]:
    """The plan of least predicted damage for each budget, on top of a plan; in that order.

    Args:
        space: Choices and costs.
        base: Steps that every plan has, which add no MACs.
        cost: Damage that each step adds on top of it; negative where it takes some away.
        budgets: Ratios to the MACs of the network as it is.
    """
    usable = {s: c for s, c in cost.items() if s not in base.steps and _with(space, base, s)}
    total = sum(abs(c) for c in usable.values()) + 1.0
    front = predicted_front(space, {s: -c for s, c in usable.items()}, total, most=1 << 30)
    found: list[Plan] = []
    for budget in budgets:
        fitting = [p for p, _ in front if space.predicted_macs(p) <= budget * space.macs]
        if fitting and space.predicted_macs(fitting[-1]) >= (budget - STEP) * space.macs:
            found.append(space.repair([*base.steps, *fitting[-1].steps]))
    return list(dict.fromkeys(found))


def _with(space: Space, base: Plan, step: Step) -> bool:
    """Whether a step can be carried out beside all of the base."""
    needs = space.nodes.get(step)
    return needs is not None and not any(
        needs & space.nodes.get(s, frozenset()) for s in base.steps
    )


def uniform_plans(space: Space, base: Plan) -> list[Plan]:
    """The control: the same amount wherever it can be taken, for each amount."""
    amounts: dict[str, list[Step]] = {}
    for step in space.steps():
        if saves(step) and not rule_named(step.rule).scales and _with(space, base, step):
            amounts.setdefault(step.rule, []).append(step)
    return [space.repair([*base.steps, *steps]) for steps in amounts.values()]


def corrected(
    prices: Mapping[Step, float], base: Plan, scores: Mapping[str, Score]
) -> dict[Step, float]:
    """The prices of steps, given the damages of the plans that were scored on top of a plan.

    The logarithm of a common factor comes first (the sum of single prices is usually too much),
    then each step's own.

    Args:
        prices: Damage that each step alone is predicted to add.
        base: What the plans have besides.
        scores: Of plans by text.
    """
    bottom = scores[str(base)].damage if str(base) in scores else None
    steps = sorted(prices)
    column = {step: i for i, step in enumerate(steps)}
    rows: list[list[float]] = []
    seen: list[float] = []
    for text in sorted(scores):
        score = scores[text]
        more = set(Plan.parse(text).steps) - set(base.steps)
        usable = score.error is None and not score.stopped and score.damage is not None
        if not usable or bottom is None or not more or not more <= set(column):
            continue
        if not set(base.steps) <= set(Plan.parse(text).steps):
            continue
        row = [0.0] * len(steps)
        for step in more:
            row[column[step]] = 1.0
        rows.append(row)
        seen.append(max(float(score.damage or 0.0) - bottom, 1e-9))
    if not rows:
        return dict(prices)
    x, y = np.array(rows), np.array(seen)
    prior = np.array([prices[s] for s in steps])
    known = x @ prior
    factor = math.exp(float(np.mean(np.log(y / np.maximum(known, 1e-9)))))
    prior = prior * factor
    spread = x * (DOUBT * np.abs(prior)) ** 2
    inverse = np.linalg.pinv(spread @ x.T + np.diag((NOISE * y) ** 2 + 1e-12))
    mean = prior + spread.T @ inverse @ (y - x @ prior)
    mean = np.maximum(mean, 0.1 * prior)
    return {s: float(v) for s, v in zip(steps, mean, strict=True)}
