"""Plans a minute of two workers against one: the same plans, whose fits are stored.

    OMP_NUM_THREADS=1 python benchmarks/search_workers.py ../shared/assets/mcunet.yaml --plans 100

A first run finds the plans and fits what they need (OUT/found; it may be killed and run again). Then one
and two workers in turn score the very same plans in copies of the run directory that have the fits and
the ranking of the layers, but no score: the plans are put into the queue of their study, as any
user of Optuna would do it. Every worker computes with one thread. Plans a minute are counted while all workers of a run are at
work; the seconds of a whole command, with its start and the confirmation of the front, are printed beside.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import optuna
import torch
from optuna.trial import FrozenTrial

from search.study.storage import journal

SCORES = ("scores.jsonl", "samples", "journal.log*", "workers")
SPARE = 8  # plans more than asked for, since some are above the limits


def run(config: Path, folder: Path, trials: int, workers: int) -> float:
    """Seconds of ``quantfix run``, each worker with one thread."""
    words = ["run", str(config), "--out", str(folder), "-q"]
    words += ["--trials", str(trials), "--workers", str(workers)]
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "search.cli", *words],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return time.monotonic() - began


def study_in(folder: Path) -> optuna.Study:
    """The latest study of a run directory."""
    storage = journal(folder / "journal.log")
    # each change of the rules begins another
    name = optuna.get_all_study_names(storage)[-1]
    return optuna.load_study(study_name=name, storage=storage)


def scored(study: optuna.Study) -> list[FrozenTrial]:
    """The trials with a plan that was scored, or given up early."""
    return [
        t
        for t in study.get_trials(deepcopy=False)
        if t.state.is_finished() and t.user_attrs.get("plan") and "counts" in t.user_attrs
    ]


def rate(trials: list[FrozenTrial]) -> float:
    """Plans a minute while all workers are at work."""
    owners: dict[str, list[FrozenTrial]] = {}
    for t in trials:
        owners.setdefault(t.user_attrs["worker"], []).append(t)
    began = max(min(_start(t) for t in mine) for mine in owners.values())
    ended = min(max(_end(t) for t in mine) for mine in owners.values())
    # a plan that is only in part between the two counts as that part
    shares = (
        max(0.0, min(_end(t), ended) - max(_start(t), began)) / (_end(t) - _start(t))
        for t in trials
    )
    return 60 * sum(shares) / (ended - began)


def _start(trial: FrozenTrial) -> float:
    assert trial.datetime_start is not None
    return trial.datetime_start.timestamp()


def _end(trial: FrozenTrial) -> float:
    assert trial.datetime_complete is not None
    return trial.datetime_complete.timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, help="default: runs/workers-NAME")
    parser.add_argument("--plans", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2, help="of each number of workers")
    options = parser.parse_args()
    out = options.out or Path("runs") / f"workers-{options.config.stem}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    seconds = run(options.config, out / "found", options.plans + SPARE, 2)
    # layers in float that the front is compared with go above the limits, which a queue may not
    within = [t for t in scored(study_in(out / "found")) if max(t.constraints.values()) <= 0]
    found = within[: options.plans]
    print(f"{len(found)} plans found and fitted in {seconds:.0f} s by two workers", flush=True)

    rates: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(options.repeats):
        for workers in rates:
            folder = out / f"{workers}-{repeat}"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(out / "found", folder, ignore=shutil.ignore_patterns(*SCORES))
            stored = len(list((folder / "fits").iterdir()))
            run(options.config, folder, 1, 1)
            study = study_in(folder)
            for trial in found:
                study.enqueue_trial(trial.params)
            seconds = run(options.config, folder, len(found) + 1, workers)
            again = [t for t in scored(study_in(folder)) if t.user_attrs.get("enqueued")]
            rates[workers].append(rate(again))
            early = sum(t.state == optuna.trial.TrialState.PRUNED for t in again)
            made = len(list((folder / "fits").iterdir())) - stored
            images = max(t.user_attrs["samples"] or 0 for t in again)
            print(
                f"{workers} worker{'s' * (workers > 1)}: {len(again)} plans on {images} images"
                f" ({early} given up early, {made} new fits),"
                f" {rates[workers][-1]:.1f} plans a minute, {seconds:.0f} s in all",
                flush=True,
            )
    best = {workers: max(values) for workers, values in rates.items()}
    engine = found[0].user_attrs["engine"]
    print(
        f"2 workers to 1, the faster run of each: {best[2] / best[1]:.2f}x; {engine}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
