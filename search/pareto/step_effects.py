"""What each step of a plan costs and gains, from the plans that were scored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from search.run_dir.scores import Score


@dataclass(frozen=True)
class StepEffect:
    """One step, measured as the difference of two scored plans, of which one has this step more.

    Attributes:
        step: ``rule@anchor``; several, where they were only ever scored together.
        macs: What it adds per input.
        damage: Change of the damage; negative is better.
        metric: Change of the metric, as a fraction; None without labels.
        beside: How many other steps both plans have: those of the largest known pair inside the plan. None: no
            such pair was scored, and the three numbers are None too.
    """

    step: str
    macs: int | None = None
    damage: float | None = None
    metric: float | None = None
    beside: int | None = None

    @property
    def on(self) -> str:
        """What was measured with and without the step, in words."""
        if self.beside is None:
            return "not measured apart from the others"
        several = "together" if " " in self.step else ""
        if not self.beside:
            return several or "alone"
        rest = f"on top of {self.beside} other step{'s' if self.beside > 1 else ''}"
        return f"{several}, {rest}" if several else rest

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def step_effects(plan: str, scores: Iterable[Score]) -> list[StepEffect]:
    """The effect of each step of a plan.

    Args:
        plan: Text of the plan.
        scores: All that is scored; failed plans and those given up early do not count.

    >>> known = [Score("", 100, damage=0.5), Score("keep_float@fc", 100, damage=0.25)]
    >>> step_effects("keep_float@fc", known)[0].damage
    -0.25
    """
    steps = frozenset(plan.split())
    known = {
        frozenset(s.plan.split()): s
        for s in scores
        if s.error is None and not s.stopped and s.damage is not None
    }
    inside = sorted((k for k in known if k <= steps), key=len, reverse=True)
    found = [_effect(step, inside, known) for step in plan.split()]
    apart = [e.step for e in found if e.beside is None]
    groups = _together(frozenset(apart), inside, known) if len(apart) > 1 else []
    grouped = {step for e in groups for step in e.step.split()}
    place = plan.split().index
    found = groups + [e for e in found if e.step not in grouped]
    return sorted(found, key=lambda e: min(map(place, e.step.split())))


def _effect(
    step: str, inside: list[frozenset[str]], known: dict[frozenset[str], Score]
) -> StepEffect:
    for whole in inside:
        if step in whole and whole - {step} in known:
            return _difference(frozenset([step]), whole, known)
    return StepEffect(step)


def _together(
    steps: frozenset[str], inside: list[frozenset[str]], known: dict[frozenset[str], Score]
) -> list[StepEffect]:
    """The smallest groups of steps, each the difference of two scored plans."""
    found: list[StepEffect] = []
    pairs = [(a, a - b) for a in inside for b in inside if b < a and a - b <= steps]
    for whole, group in sorted(pairs, key=lambda pair: (len(pair[1]), -len(pair[0]))):
        if group <= steps:
            found.append(_difference(group, whole, known))
            steps -= group
    return found


def _difference(
    steps: frozenset[str], whole: frozenset[str], known: dict[frozenset[str], Score]
) -> StepEffect:
    a, b = known[whole - steps], known[whole]
    gained = None if a.metric is None or b.metric is None else b.metric - a.metric
    lost = (b.damage or 0.0) - (a.damage or 0.0)
    return StepEffect(" ".join(sorted(steps)), b.macs - a.macs, lost, gained, len(whole - steps))


def effect_said(effect: StepEffect, metric: str) -> str:
    """One line about a step."""
    if effect.beside is None:
        return f"{effect.step}: {effect.on}"
    cost = f"{effect.macs / 1e6:+.2f} M MACs" if effect.macs else "no MACs"
    gain = "" if effect.metric is None else f", {metric} {100 * effect.metric:+.2f} points"
    return f"{effect.step}: {cost}, damage {effect.damage:+.3g}{gain} ({effect.on})"
