"""The steps of a run: analyse, lay out the space, try what is promising, search."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from rewriter import RULES, Plan, Step, cost, find_sites
from rewriter.fitting import Price, thin_table
from rewriter.graph import layers
from rewriter.ladder import AT_PLACES, exact_splits
from rewriter.storage import short
from search.config.messages import dotted, explain
from search.config.schema import Config, ConfigError, SearchConfig
from search.job import Job, OnScore, Progress, silent
from search.pareto.controls import has_one_knob
from search.pareto.front import cost_named, select_front
from search.pareto.limits import Limits
from search.pareto.plan_summary import places_of
from search.results import load_results
from search.run_dir.scores import Samples, Score, note
from search.scoring.added_macs import extra_macs
from search.scoring.child_process import possible
from search.scoring.confirm import confirm
from search.scoring.deployed import score_deployed
from search.scoring.evaluator import RewriteEvaluator
from search.scoring.expected import unexpected
from search.scoring.failure import to_be_tried_again
from search.scoring.racing import Race
from search.scoring.slow_steps import warn_of_slow_plan
from search.sensitivity.run import Sensitivity, analyze, float_gains_on, read_sensitivity
from search.strategy.budgets import STEP, Savings
from search.strategy.ladder_replay import climbed
from search.strategy.recipe import architecture_digest, first, read_recipe
from search.strategy.schedule import Worth, of_the_ladder, splits_of, worth_trying
from search.strategy.space import KEEP_FLOAT, Budget, Space, make_space
from search.strategy.step_conflicts import clashes
from search.study.storage import storage_at
from search.study.study import Outcome, Settings, search

log = logging.getLogger(__name__)

GRACE_S = 60.0  # what a plan's time limit may be overrun by, clocks that differ included


def sensitivity_of(job: Job, progress: Progress = silent, *, exact: bool = False) -> Sensitivity:
    """The analysis of a run: the one in its directory, or a new one."""
    known = read_sensitivity(job.folder, job.records.fingerprint, exact=exact)
    if known is not None:
        return known
    with progress("ranking the layers") as tick:
        return analyze(job.evaluator, job.folder, exact=exact, tick=tick)


def note_run(job: Job, storage: str | None = None, goal: Goal | None = None) -> None:
    """Write what readers of the run directory and further workers need."""
    baseline = job.evaluator.baseline()
    count, metric = job.evaluator.samples.count, job.evaluator.task.metric
    odd = unexpected(job.cfg.expect.float, baseline.float, count, metric)
    if odd:
        log.warning("expect.float: %s", odd)
    note(
        job.folder,
        baseline=asdict(baseline),
        objective=job.objective,
        limits=limits_of(job).to_dict(),
        options=job.cfg.search.model_dump(),
        storage=storage,
        goal=None if goal is None else asdict(goal),
        places=places_of(job.gm),
        architecture=architecture_digest(job.gm),
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
        macs=options.most_macs * spent.macs,
        params=None if options.max_params is None else options.max_params * spent.params,
        weight_bytes=options.max_weight_bytes,
        float_layers=most,
        float_islands=options.max_float_islands,
        latency_ms=options.max_latency_ms,
        latency_ratio=options.max_latency_ratio or None,
    )


def space_of(job: Job, sensitivity: Sensitivity) -> Space:
    """The search space of a run, laid out once for each ranking."""
    for ranking, known in job.spaces:
        if ranking == sensitivity:
            return known
    macs = job.evaluator.baseline().macs

    def price(step: Step) -> int | None:
        return extra_macs(job.gm, [Plan((step,))], macs).get(str(step))

    damage = sensitivity.damage_by_node()
    limits = limits_of(job)
    least = job.cfg.search.least_macs
    # a plan for the lowest budget comes out a little below it
    lowest = least if least >= 1 else least - STEP
    budget = Budget(limits.macs, limits.float_layers, lowest * macs)
    fixed = job.cfg.search.resolution == "fixed"
    unwanted = [r.name for r in RULES if r.saves and (least >= 1 or (r.scales and fixed))]
    sites = [s for s in find_sites(job.gm) if s.rule not in unwanted]
    split = [s.anchor for _, steps in exact_splits(job.gm, sites, damage) for s in steps]
    space = make_space(
        sites, damage, price, macs, budget, always=split, clashes=partial(clashes, job.gm)
    )
    job.spaces.append((sensitivity, space))
    return space


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
            of_the_ladder(plan, AT_PLACES)
            or all(s.rule == KEEP_FLOAT for s in plan.steps)
            or has_one_knob(plan)  # what the front is compared with
        ),
        cost=cost_named(options.cost),
    )


def note_ladder(job: Job, sensitivity: Sensitivity) -> None:
    """Write those rungs of the ladder of free remedies into ``run.json`` that are scored."""
    scores = {s.plan: s for s in job.records.scores()}
    splits = splits_of(job.gm, space_of(job, sensitivity), sensitivity)
    ladder = climbed(job.gm, scores, splits, limits_of(job).latency_ratio)
    note(job.folder, ladder=[[r.name, str(r.plan), r.kept] for r in ladder])


def run_search(
    job: Job,
    sensitivity: Sensitivity,
    storage: str | None = None,
    on_score: OnScore = lambda score, count: None,
    goal: Goal | None = None,
) -> Outcome:
    """Search until the config's budget is used up; the same call again goes on from there.

    Args:
        job: What to search.
        sensitivity: Its analysis.
        storage: URL of a shared Optuna storage; None: a journal in the run directory.
        on_score: Called after each plan.
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
    options, evaluator = job.cfg.search, searching(job)
    if evaluator.limit_s is None and "candidate_timeout" in options.model_fields_set:
        log.warning("search.candidate_timeout: not kept: needs Linux and device cpu, without CUDA")
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
        again=lambda score: to_be_tried_again(score, evaluator.limit_s),
        elsewhere_s=None if options.store is None else options.candidate_timeout + GRACE_S,
    )
    place = storage_at(storage or str(job.folder / "journal.log"))
    gains_on = partial(float_gains_on, job.evaluator)
    savings = _savings(job, space)
    worth: Worth = worth_trying(
        job.gm,
        space,
        sensitivity,
        options.trials,
        settings.admits,
        gains_on,
        savings,
        most_time=options.max_latency_ratio or None,
    )
    if options.recipe is not None:
        recipe = read_recipe(job.cfg.resolve(options.recipe), job.gm, job.cfg.target)
        worth = first(recipe, worth, settings.admits)
    enough = _meets(job, goal)
    return search(evaluator, job.records, space, worth, settings, place, on_score, enough)


def _savings(job: Job, space: Space) -> Savings | None:
    """What to take away for less compute, where the config asks for it."""
    options, known = job.cfg.search, job.evaluator
    if options.least_macs >= 1:
        return None

    def table() -> Mapping[Step, Price]:
        batches = known.calibration
        return thin_table(job.gm, batches, known.scheme, known.store, known.seed)

    return Savings(space, options.least_macs, options.most_macs, table)


def searching(job: Job) -> RewriteEvaluator:
    """A run's evaluator as it searches: plans are given up early, and each is scored in a process of its own where that can be."""
    own = job.evaluator
    limit_s = job.cfg.search.candidate_timeout if possible(own.device) else None
    return replace(own, race=race_of(job), limit_s=limit_s)


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
    macs, limits, evaluator = job.evaluator.baseline().macs, limits_of(job), searching(job)
    return lambda score: (
        score.error is None
        and not score.stopped
        and score.macs <= macs
        and score.float_layers == 0
        and limits.meets(score)
        and goal.met(job, score)
        and goal.met(job, evaluator.score(Plan.parse(score.plan), "whole"))
    )


def confirm_front(job: Job, progress: Progress = silent) -> None:
    """Run what the run directory shows on all images, where some are held back, and on the engine that ships it."""
    job.records.refresh()
    results = load_results(job.folder)
    plans = [s.plan for s in (*results.chosen.all(), *results.references)]
    if job.evaluator.confirmations is not None:
        with progress("confirming the front") as tick:
            confirm(searching(job), list(dict.fromkeys(["", *plans])), tick)
        results = load_results(job.folder)
    if results.front.points:
        most = limits_of(job).latency_ratio
        warn_of_slow_plan(job.evaluator, results.scores, results.best(), most)
    with progress("confirming on the runtime that ships"):
        shown = [s for s in (results.empty(), *results.front.points) if s is not None]
        score_deployed(job.evaluator, job.folder, shown)


def cheapest(job: Job, goal: Goal, max_macs: float) -> Score | None:
    """The cheapest plan that meets a goal on the images that choose and then on all of them."""
    job.records.refresh()
    results = load_results(job.folder)
    for score in results.meeting(goal.max_drop, max_macs, goal.max_damage):
        whole = searching(job).score(Plan.parse(score.plan), "whole")
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
    return f"{job.cfg.path.stem}-{short(text)[:12]}"
