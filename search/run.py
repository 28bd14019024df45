"""The steps of a run: analyse, lay out the space, try what is promising, search."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError
from torch import fx

from rewriter import Plan, Step, cost, find_sites
from rewriter.graph import layers
from rewriter.ladder import REMEDIES, Splits
from rewriter.splits import HEAD, RANGES, TAIL, exact_splits
from search.analysis import Sensitivity, analyze, read_sensitivity
from search.apart import possible
from search.clashes import clashes
from search.config import Config, ConfigError, SearchConfig
from search.config_faults import dotted, explain
from search.confirm import confirm
from search.constraints import Limits
from search.evaluator import extra_macs
from search.failure import to_be_tried_again
from search.front import cost_named, select_front
from search.job import Job, Progress, Told, silent
from search.prediction import refitted
from search.racing import Race
from search.records import Samples, Score, note
from search.results import load_results
from search.rungs import climbed, rungs, start
from search.space import (
    KEEP_FLOAT,
    Budget,
    Space,
    make_space,
    predicted_front,
    reference_plans,
    single_plans,
)
from search.storage import storage_at
from search.study import Outcome, Settings, search

log = logging.getLogger(__name__)

GRACE_S = 60.0  # what a plan's time limit may be overrun by, clocks that differ included
LEAST_LEFT = 0.02  # no step is trusted to take away more than 98 % of the damage


def sensitivity_of(job: Job, progress: Progress = silent, *, exact: bool = False) -> Sensitivity:
    """The analysis of a run: the one in its directory, or a new one."""
    known = read_sensitivity(job.folder, job.records.fingerprint, exact=exact)
    if known is not None:
        return known
    with progress("ranking the layers") as tick:
        return analyze(job.evaluator, job.folder, exact=exact, tick=tick)


def note_run(job: Job, storage: str | None = None, goal: Goal | None = None) -> None:
    """Write what readers of the run directory and further workers need."""
    note(
        job.folder,
        baseline=asdict(job.evaluator.baseline()),
        objective=job.objective,
        limits=limits_of(job).to_dict(),
        options=job.cfg.search.model_dump(),
        storage=storage,
        goal=None if goal is None else asdict(goal),
    )


def noted_goal(facts: Mapping[str, Any]) -> Goal | None:
    """What the run whose ``run.json`` this is searches for, where that is not the whole front."""
    goal = facts.get("goal")
    return None if goal is None else Goal(goal.get("max_drop"), goal.get("max_damage"))


def limits_of(job: Job) -> Limits:
    """The limits of the config; by default 1 layer in 20, at least 1, may stay in float."""
    options = job.cfg.search
    most = options.max_float_layers
    if most is None:
        most = max(1, len(layers(job.gm)) // 20)
    spent = cost(job.gm)
    return Limits(
        macs=options.max_macs * spent.macs,
        params=None if options.max_params is None else options.max_params * spent.params,
        weight_bytes=options.max_weight_bytes,
        float_layers=most,
        float_islands=options.max_float_islands,
        latency_ms=options.max_latency_ms,
    )


def space_of(job: Job, sensitivity: Sensitivity) -> Space:
    """The search space of a run."""
    macs = job.evaluator.baseline().macs

    def price(step: Step) -> int | None:
        return extra_macs(job.gm, [Plan((step,))]).get(str(step))

    damage = sensitivity.damage_by_node()
    limits = limits_of(job)
    budget = Budget(macs=limits.macs, float_layers=limits.float_layers)
    sites = find_sites(job.gm)
    split = [s.anchor for _, steps in exact_splits(job.gm, sites, damage) for s in steps]
    return make_space(
        sites, damage, price, macs, budget, always=split, clashes=partial(clashes, job.gm)
    )


def race_of(job: Job) -> Race:
    """When a plan of a run is given up early: judged against the front of what is known."""
    limits, records, options = limits_of(job), job.records, job.cfg.search
    seen: dict[int, list[tuple[Score, Samples]]] = {}

    def rivals() -> list[tuple[Score, Samples]]:
        records.refresh()
        scores = records.scores()
        if len(scores) not in seen:
            front = select_front(
                [s for s in scores if not s.plan or limits.meets(s)],
                records.samples,
                objective=job.objective,
                higher_is_better=job.evaluator.task.higher_is_better,
                cost=options.cost,
            )
            known = ((s, records.samples(s.plan)) for s in front.points)
            seen.clear()
            seen[len(scores)] = [(s, values) for s, values in known if values is not None]
        return seen[len(scores)]

    return Race(
        rivals=rivals,
        least=options.race,
        objective=job.objective,
        higher_is_better=job.evaluator.task.higher_is_better,
        spared=lambda plan: (
            _of_the_ladder(plan, (TAIL, HEAD, *RANGES))
            or all(s.rule == KEEP_FLOAT for s in plan.steps)
        ),
        cost=cost_named(options.cost),
    )


def worth_trying(
    gm: fx.GraphModule,
    space: Space,
    sensitivity: Sensitivity,
    trials: int,
    admits: Callable[[Plan], bool] = lambda plan: True,
) -> Callable[[Mapping[str, Score]], list[Plan]]:
    """What to score first, before any search.

    The ladder of free remedies, the references (it may be all that a small budget reaches, and what it finds is
    worth more than a curve to compare with), each answer on top of the ladder's best rung, what these
    predict to be best, and from then on, every other time, what all scores predict.

    A step is taken to multiply the damage by the factor that it has alone: so the prediction never
    falls below zero, and the logarithm is additive. A layer in float that was not scored takes
    away the share of the damage that it does alone.

    Args:
        gm: Profiled canonical graph.
        space: Choices and costs.
        sensitivity: Damage of each layer.
        trials: Plans that will be scored in all; a third of them are single answers.
        admits: Whether a plan can be carried out within the limits; others are left out.
    """
    first = reference_plans([d.node for d in sensitivity.layers], space)
    singles = [p for p in single_plans(space, max(6, trials // 3)) if not _of_the_ladder(p)]
    alone = {Step(KEEP_FLOAT, d.node): d.damage for d in sensitivity.layers}

    splits = _splits(gm, space, sensitivity)

    def on_top(base: Plan, plans: Iterable[Plan]) -> list[Plan]:
        return [plan for plan in _on_top(space, base, plans) if admits(plan)]

    def worth(scores: Mapping[str, Score]) -> list[Plan]:
        ladder = rungs(gm, scores, splits)
        if isinstance(ladder, Plan):
            return list(dict.fromkeys([*first[:1], *_below(gm, scores, splits), ladder]))
        base = start(ladder)
        kept = (r.plan for r in ladder if not r.note)
        plans = [*first[:1], *kept, *first[1:], *on_top(base, singles)]
        empty, bottom = scores.get(""), scores.get(str(base))
        if any(str(p) not in scores for p in plans):
            return plans
        if empty is None or not empty.damage or bottom is None or not bottom.damage:
            return plans
        gain: dict[Step, float] = {}
        measured: set[Step] = set()
        for step in space.steps():
            score = scores.get(str(space.repair([*base.steps, step])))
            if step in base.steps:
                continue
            if score is not None and score.damage is not None:
                left = score.damage / bottom.damage
                measured.add(step)
            else:
                left = 1 - alone.get(step, 0.0) / empty.damage
            gain[step] = -math.log(max(left, LEAST_LEFT))
        total = math.log(bottom.damage)
        plans += on_top(base, [p for p, _ in predicted_front(space, gain, total)])
        if len(scores) % 2 == 0 and all(str(p) in scores for p in plans):
            gains = refitted(gain, frozenset(measured), base, scores)
            for belief in (gains.mean, gains.hoped()):
                found = predicted_front(space, belief, total)
                plans += on_top(base, [plan for plan, _ in found])
        return plans

    return worth


def note_ladder(job: Job, sensitivity: Sensitivity) -> None:
    """Write those rungs of the ladder of free remedies into ``run.json`` that are scored."""
    scores = {s.plan: s for s in job.records.scores()}
    splits = _splits(job.gm, space_of(job, sensitivity), sensitivity)
    ladder = climbed(job.gm, scores, splits)
    note(job.folder, ladder=[[r.name, str(r.plan), r.kept] for r in ladder])


def _splits(gm: fx.GraphModule, space: Space, sensitivity: Sensitivity) -> Splits:
    found = exact_splits(gm, find_sites(gm), sensitivity.damage_by_node())
    return [(name, space.repair(steps).steps) for name, steps in found]


def _of_the_ladder(plan: Plan, more: tuple[str, ...] = ()) -> bool:
    return all(step.rule in (*dict(REMEDIES).values(), *more) for step in plan.steps)


def _below(gm: fx.GraphModule, scores: Mapping[str, Score], splits: Splits) -> list[Plan]:
    """The rungs that are scored already, in the order in which they were climbed."""
    known: list[Plan] = []
    while isinstance(
        following := rungs(gm, {str(p): scores[str(p)] for p in known}, splits), Plan
    ):
        if str(following) not in scores:
            break
        known.append(following)
    return known


def _on_top(space: Space, base: Plan, plans: Iterable[Plan]) -> list[Plan]:
    """Each plan together with the steps of ``base``."""
    return list(dict.fromkeys(space.repair([*base.steps, *p.steps]) for p in plans))


def run_search(
    job: Job,
    sensitivity: Sensitivity,
    storage: str | None = None,
    told: Told = lambda score, count: None,
    goal: Goal | None = None,
) -> Outcome:
    """Search until the config's budget is used up; the same call again goes on from there.

    Args:
        job: What to search.
        sensitivity: Its analysis.
        storage: URL of a shared Optuna storage; None: a journal in the run directory.
        told: Called after each plan.
        goal: What is good enough; a plan that meets it, adds no MACs and keeps no layer in float
            ends the search, since no plan that meets the goal is cheaper.
    """
    space = space_of(job, sensitivity)
    if space.dropped:
        damage = sensitivity.damage_by_node()
        log.warning(
            "%d places are not searched: the damage of each is at most %.2g",
            len(space.dropped),
            max(damage.get(anchor, 0.0) for anchor in space.dropped),
        )
    options = job.cfg.search
    settings = Settings(
        name=_study_name(job, space),
        trials=options.trials,
        timeout_s=options.timeout,
        seed=options.seed,
        objective=job.objective,
        higher_is_better=job.evaluator.task.higher_is_better,
        cost=options.cost,
        limits=limits_of(job),
        admits=limits_of(job).admits(job.gm, {"scheme": job.evaluator.scheme}),
        again=lambda score: to_be_tried_again(score, job.evaluator.limit_s),
        elsewhere_s=None if options.store is None else options.candidate_timeout + GRACE_S,
    )
    job.evaluator.race = race_of(job)
    job.evaluator.limit_s = _time_limit(job)
    place = storage_at(storage or str(job.folder / "journal.log"))
    worth = worth_trying(job.gm, space, sensitivity, options.trials, settings.admits)
    enough = _meets(job, goal)
    return search(job.evaluator, job.records, space, worth, settings, place, told, enough)


def _time_limit(job: Job) -> float | None:
    """How long a plan may take; None where it cannot be scored in a process of its own."""
    if possible(job.evaluator.device):
        return job.cfg.search.candidate_timeout
    if "candidate_timeout" in job.cfg.search.model_fields_set:
        log.warning("search.candidate_timeout: not kept: needs Linux and device cpu, without CUDA")
    return None


@dataclass(frozen=True)
class Goal:
    """What ``fix`` asks for: at most so many points lost, or so much damage; None: not asked."""

    max_drop: float | None = None
    max_damage: float | None = None

    def __str__(self) -> str:
        said = [] if self.max_drop is None else [f"at most {self.max_drop:g} points"]
        said += [] if self.max_damage is None else [f"a damage of at most {self.max_damage:g}"]
        return " and ".join(said)

    def met(self, job: Job, score: Score) -> bool:
        if self.max_drop is not None:
            sign = 100 if job.evaluator.task.higher_is_better else -100
            if score.metric is None or score.original is None:
                return False
            if sign * (score.original - score.metric) > self.max_drop:
                return False
        return self.max_damage is None or (
            score.damage is not None and score.damage <= self.max_damage
        )


def _meets(job: Job, goal: Goal | None) -> Callable[[Score], bool]:
    if goal is None or goal == Goal() or job.cfg.search.cost != "macs":
        return lambda score: False
    macs, limits = job.evaluator.baseline().macs, limits_of(job)
    return lambda score: (
        score.error is None
        and not score.stopped
        and score.macs <= macs
        and score.float_layers == 0
        and limits.meets(score)
        and goal.met(job, score)
        and goal.met(job, job.evaluator.confirm(Plan.parse(score.plan)))
    )


def confirm_front(job: Job, progress: Progress = silent) -> None:
    """Run what the run directory shows on all images, where some are held back."""
    if job.evaluator.confirmations is None:
        return
    job.records.refresh()
    results = load_results(job.folder)
    plans = [s.plan for s in (*results.chosen.all(), *results.references)]
    with progress("confirming the front") as tick:
        confirm(job.evaluator, list(dict.fromkeys(["", *plans])), tick)


def cheapest(job: Job, goal: Goal, max_macs: float) -> Score | None:
    """The cheapest plan that meets a goal on the images that choose and then on all of them."""
    job.records.refresh()
    results = load_results(job.folder)
    for score in results.meeting(goal.max_drop, max_macs, goal.max_damage):
        whole = job.evaluator.confirm(Plan.parse(score.plan))
        if goal.met(job, whole):
            return whole
    return None


def with_options(cfg: Config, **options: Any) -> Config:
    """The config with some of its ``search`` keys replaced; None leaves a key as it is."""
    given = {key: value for key, value in options.items() if value is not None}
    try:
        changed = cfg.search.model_validate({**cfg.search.model_dump(), **given})
    except ValidationError as error:
        faults = [f"{dotted(e['loc'])}: {explain(e, SearchConfig)}" for e in error.errors()]
        raise ConfigError(f"search.{'; '.join(faults)}") from error
    return cfg.model_copy(update={"search": changed}).read_from(cfg.path)


def _study_name(job: Job, space: Space) -> str:
    """One study per space, objective and seed: a changed space would not fit the old trials."""
    text = repr(
        (
            job.records.fingerprint,
            sorted(space.choices.items()),
            space.budget,
            job.objective,
            job.cfg.search.seed,
        )
    )
    return f"{job.cfg.path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
