"""Hypervolume against evaluations and seconds: this search, plain Optuna samplers, and greedy.

    python benchmarks/search_methods.py configs/digits.yaml --trials 100 --seeds 5
    python benchmarks/search_methods.py ../shared/assets/mcunet.yaml --images 150

All methods choose from the same space under the same limits, and their plans are scored by the same
evaluator: int8 kernels, no racing, all images choose. A plan that one method has had scored is known
to the others (OUT/memo), and counts for each as one evaluation and as the seconds that it took where
it was scored. So the benchmark may be killed and run again. Greedy leaves the most harmful layers in
float, one more at a time. A plan that a sampler proposes again, or that a look at the
graph shows to be impossible or above the limits, costs it nothing.

The quality is minus the damage, or minus its logarithm (``--log``: each halving counts alike), or
the metric (``--objective metric``: a few hundred images make it jump). The hypervolume is relative
to that of the front of all plans that any method found, with plain int8 at the largest MACs as
reference point. A plan above the limits counts as an evaluation and adds nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler

from rewriter import Plan, Step
from rewriter.ladder import REMEDIES
from search.config.schema import load_config
from search.job import Job, open_job
from search.pareto.front import hypervolume
from search.run import limits_of, sensitivity_of, space_of, with_options
from search.run_dir.scores import Records, Score
from search.scoring.bench import Once
from search.scoring.evaluator import RewriteEvaluator
from search.sensitivity.run import float_gains_on
from search.strategy.schedule import worth_trying
from search.strategy.space import KEEP_FLOAT, Space
from search.study.storage import journal
from search.study.study import Settings, search

AT = (10, 25, 50, 100)
IDLE = 50  # proposals in a row that are known already: the sampler has converged
Scored = Callable[[Plan], Score]


class EnoughError(Exception):
    """The evaluations of a method are used up."""


def prepared(options: argparse.Namespace) -> tuple[Job, Space, Any]:
    """The job on the first images, with scores in a memo of its own, and its space."""
    cfg = with_options(load_config(options.config), confirmation=0.0)
    job = open_job(cfg, options.out, threads=1)
    sensitivity = sensitivity_of(job)
    evaluator = job.evaluator
    count = min(options.images or evaluator.samples.count, evaluator.samples.count)
    if evaluator.samples.inputs is None or evaluator.samples.targets is None:
        raise SystemExit("needs labeled images that fit into memory")
    identity = f"{job.records.fingerprint}-{count}"
    samples = replace(
        evaluator.samples,
        count=count,
        inputs=evaluator.samples.inputs[:count],
        targets=evaluator.samples.targets[:count],
    )
    records = Records(options.out / "memo", identity)
    # what was computed of the float network is of the images that were left out too
    evaluator = replace(evaluator, samples=samples, records=records, once=Once())
    job = replace(job, evaluator=evaluator)
    space = space_of(job, sensitivity)
    left = {
        slot: tuple(rule for rule in rules if rule not in options.without)
        for slot, rules in space.choices.items()
    }
    kept = {slot: rules for slot, rules in left.items() if len(rules) > 1}
    return job, replace(space, choices=kept), sensitivity


def ours(job: Job, space: Space, sensitivity: Any, settings: Settings, scored: Scored) -> None:
    """The search of ``quantfix run``, with records of its own."""
    folder = job.folder / "ours" / settings.name
    records = Records(folder, f"{time.time_ns()}")  # what other methods know is not known to it

    def evaluate(plan: Plan) -> Score:
        score = scored(plan)
        records.add(score)
        return score

    gains_on = partial(float_gains_on, job.evaluator)
    worth = worth_trying(job.gm, space, sensitivity, settings.trials, settings.admits, gains_on)
    place = journal(folder / f"{time.time_ns()}.log")
    search(evaluate, records, space, worth, settings, place)


def sampled(
    make: Callable[[int], BaseSampler], space: Space, settings: Settings, scored: Scored
) -> None:
    """An Optuna sampler as it is, asked until the evaluations are used up."""
    study = optuna.create_study(directions=settings.directions(), sampler=make(settings.seed))
    seen: set[Plan] = set()
    idle = 0
    while idle < IDLE:
        trial = study.ask()
        choice = {s: str(trial.suggest_categorical(s, r)) for s, r in space.choices.items()}
        plan = space.plan(choice)
        if not settings.admits(plan):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        idle = idle + 1 if plan in seen else 0
        seen.add(plan)
        values = settings.values(scored(plan))
        if values is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, values)


def greedy(sensitivity: Any, scored: Scored) -> None:
    """The most harmful layers left in float, one more at a time."""
    ranked = [Step(KEEP_FLOAT, layer.node) for layer in sensitivity.layers]
    for count in range(len(ranked) + 1):
        scored(Plan(tuple(ranked[:count])))


# Each with seeds of its own: with one seed, the random plans that all three begin with would be the same.
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(multivariate=True, seed=3 * seed),
    "nsga2": lambda seed: NSGAIISampler(population_size=20, seed=3 * seed + 1),
    "random": lambda seed: RandomSampler(seed=3 * seed + 2),
}


def run(name: str, job: Job, space: Space, sensitivity: Any, settings: Settings) -> list[Score]:
    """The scores of a method's evaluations, in order."""
    order: dict[str, Score] = {}
    evaluator: RewriteEvaluator = job.evaluator

    def scored(plan: Plan) -> Score:
        text = str(plan)
        if text not in order:
            if len(order) == settings.trials:
                raise EnoughError
            evaluator.records.refresh()  # what another process of this benchmark has scored
            order[text] = evaluator(plan)
        return order[text]

    try:
        if name == "ours":
            ours(job, space, sensitivity, settings, scored)
        elif name == "greedy":
            greedy(sensitivity, scored)
        else:
            sampled(SAMPLERS[name], space, settings, scored)
    except EnoughError:
        pass
    return list(order.values())


class Volume:
    """Hypervolume of scores, relative to the front of all scores that count."""

    def __init__(self, job: Job, options: argparse.Namespace, everything: list[Score]) -> None:
        self.limits, self.options = limits_of(job), options
        self.up = job.evaluator.task.higher_is_better
        empty = job.evaluator(Plan(()))
        # a hair beyond both, so that the reference point itself counts as dominated by its like
        self.corner = (float(self.limits.macs or empty.macs) + 1, self.quality(empty) - 1e-12)
        self.whole = self.of(everything)

    def quality(self, score: Score) -> float:
        if self.options.objective == "metric":
            value = float(score.metric or 0.0)
            return value if self.up else -value
        damage = float(score.damage or 0.0)
        return -float(np.log10(max(damage, 1e-9))) if self.options.log else -damage

    def of(self, scores: list[Score]) -> float:
        good = [s for s in scores if s.error is None and (not s.plan or self.limits.meets(s))]
        macs = np.array([float(s.macs) for s in good])
        return hypervolume(macs, np.array([self.quality(s) for s in good]), self.corner)

    def curve(self, scores: list[Score]) -> list[float]:
        """After each evaluation."""
        return [self.of(scores[: i + 1]) / self.whole for i in range(len(scores))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, help="default: runs/search-NAME")
    parser.add_argument("--images", type=int, help="the first so many; default: all")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=["ours", *SAMPLERS, "greedy"])
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        metavar="RULE",
        help="not in the space; the ladder's remedies must be, or the warm start would end there",
    )
    parser.add_argument("--objective", choices=["damage", "metric"], default="damage")
    parser.add_argument("--log", action="store_true")
    options = parser.parse_args()
    climbed = sorted({*options.without} & {*dict(REMEDIES).values()})
    if climbed:
        parser.error(f"--without: the ladder climbs these: {' '.join(climbed)}")
    options.out = options.out or Path("runs") / f"search-{options.config.stem}"
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.disable(logging.WARNING)  # of each plan that cannot be carried out
    job, space, sensitivity = prepared(options)
    print(f"{len(space.choices)} choices, {space.product:.3g} combinations", flush=True)
    settings = Settings(
        name="",
        trials=options.trials,
        objective=options.objective,
        higher_is_better=job.evaluator.task.higher_is_better,
        limits=limits_of(job),
        admits=limits_of(job).admits(job.gm, {"scheme": job.evaluator.scheme}),
    )
    found: dict[tuple[str, int], list[Score]] = {}
    for seed in range(options.seeds):
        for name in options.methods:
            if name == "greedy" and seed:
                continue
            found[name, seed] = run(
                name, job, space, sensitivity, replace(settings, seed=seed, name=str(seed))
            )
            print(f"{name} {seed}: {len(found[name, seed])} plans", file=sys.stderr, flush=True)
        show(job, options, found)


def show(job: Job, options: argparse.Namespace, found: dict[tuple[str, int], list[Score]]) -> None:
    """Medians over seeds at some evaluations, what TPE's last is reached at, and the curves."""
    volume = Volume(job, options, [s for scores in found.values() for s in scores])
    curves = {key: volume.curve(scores) for key, scores in found.items()}
    at = [n for n in AT if n <= options.trials]
    print(f"\n{'method':8}" + "".join(f"{f'at {n}':>10}" for n in at) + f"{'s/plan':>10}")
    for name in dict.fromkeys(name for name, _ in found):
        mine = [c for (n, _), c in curves.items() if n == name]
        values = [statistics.median(c[min(n, len(c)) - 1] for c in mine) for n in at]
        times = [s.seconds for (n, _), scores in found.items() if n == name for s in scores]
        print(
            f"{name:8}" + "".join(f"{v:10.4f}" for v in values) + f"{statistics.mean(times):10.2f}"
        )
    for name in dict.fromkeys(name for name, _ in found if name not in ("ours", "greedy")):
        reached = list(_reached(found, curves, name))
        if reached:
            plans, seconds = zip(*reached, strict=True)
            print(
                f"the last hypervolume of {name} is reached by ours within "
                f"{statistics.median(plans):g} evaluations {list(plans)} and "
                f"{statistics.median(seconds):.3g} of its seconds (medians of {len(plans)} seeds)"
            )
    content = {
        f"{name} {seed}": {"volume": curves[name, seed], "seconds": [s.seconds for s in scores]}
        for (name, seed), scores in found.items()
    }
    path = options.out / "curves.json"
    path.write_text(json.dumps(content))
    print(f"written: {path}")


def _reached(found: Any, curves: Any, name: str) -> Iterator[tuple[float, float]]:
    """Per seed: evaluations, and share of the seconds, until ours is as good as another's last."""
    for (method, seed), curve in curves.items():
        if method != name or ("ours", seed) not in curves:
            continue
        mine = curves["ours", seed]
        first = next((i for i, v in enumerate(mine) if v >= curve[-1] - 1e-9), None)
        taken = sum(s.seconds for s in found[name, seed])
        if first is None:
            yield float("inf"), float("inf")
        else:
            yield first + 1, sum(s.seconds for s in found["ours", seed][: first + 1]) / taken


if __name__ == "__main__":
    main()
