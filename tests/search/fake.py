"""A search space and an evaluator that are formulas: no model, no data."""

from __future__ import annotations

import numpy as np

from rewriter.plan import Plan, Step
from rewriter.rules import Site
from search.run_dir.scores import Records, Samples, Score
from search.strategy.space import Budget, Space, make_space

MACS = 1_000_000
LAYERS = ("stem", "dw0", "pw0", "dw1", "pw1", "dw2", "head")
DAMAGE: dict[str, float] = dict(
    zip(LAYERS, (0.05, 0.2, 0.01, 0.08, 0.005, 0.03, 0.002), strict=True)
)
TOTAL = 0.4
GAIN = {
    **{Step("keep_float", name): damage for name, damage in DAMAGE.items()},
    Step("merge_separable", "dw0"): 0.15,
    Step("merge_separable", "dw1"): 0.06,
    Step("replace_block", "stem"): 0.04,
    Step("fuse_expand", "head"): 0.001,
}
EXTRA_MACS = {Step("merge_separable", "dw0"): 80_000, Step("merge_separable", "dw1"): 120_000}


def sites() -> list[Site]:
    return [
        *(Site("keep_float", (name,)) for name in LAYERS),
        Site("merge_separable", ("dw0", "pw0")),
        Site("merge_separable", ("dw1", "pw1")),
        Site("merge_separable", ("dw2",), blocked="grouped, not depthwise: groups=2"),
        Site("replace_block", ("stem",)),
        Site("fuse_expand", ("head",)),
    ]


def price(step: Step) -> int:
    return EXTRA_MACS.get(step, 0)


def space(budget: Budget | None = None, limit: int = 24) -> Space:
    return make_space(sites(), DAMAGE, price, MACS, budget, limit)


def fake_damage(plan: Plan) -> float:
    """Additive but for one interaction: two merges together gain less than their sum."""
    both = {Step("merge_separable", "dw0"), Step("merge_separable", "dw1")} <= set(plan.steps)
    return TOTAL - sum(GAIN[s] for s in plan.steps) + (0.03 if both else 0.0)


class FakeEvaluator:
    """Scores by formula and counts its work; `fails` are plans that cannot be scored."""

    def __init__(self, records: Records, fails: frozenset[str] = frozenset()) -> None:
        self.records, self.fails = records, fails
        self.scored: list[str] = []

    def __call__(self, plan: Plan) -> Score:
        text = str(plan)
        known = self.records.get(text)
        if known is not None:
            return known
        self.scored.append(text)
        macs = MACS + sum(EXTRA_MACS.get(s, 0) for s in plan.steps)
        floats = sum(s.rule == "keep_float" for s in plan.steps)
        if text in self.fails:
            self.records.add(Score(plan=text, macs=macs, error="planted"))
            return self.records.scores()[-1]
        damage = fake_damage(plan)
        random = np.random.default_rng(0)
        right = (random.uniform(size=400) > 0.2 + 0.3 * damage).astype(np.float64)
        score = Score(
            plan=text,
            macs=macs,
            macs_ratio=macs / MACS,
            float_layers=floats,
            metric=float(right.mean()),
            interval=(float(right.mean()) - 0.02, float(right.mean()) + 0.02),
            metric_float=0.8,
            damage=damage,
            engine="formula",
            samples=400,
        )
        self.records.add(score, Samples(damage=np.full(400, damage), metric=right))
        return score
