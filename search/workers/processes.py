"""More processes of one search: beside this one, and whoever joins from elsewhere."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from search.config.schema import load_config
from search.job import Job, OnScore, open_job
from search.run import Goal, run_search, sensitivity_of, with_options
from search.study.study import Outcome


@contextmanager
def helpers(job: Job, storage: str | None, goal: Goal | None = None) -> Generator[int]:
    """The config's other worker processes beside this one; they end with the search, or when one of all has met the goal.

    The threads that this process may use (``OMP_NUM_THREADS``, else the cores) are shared among all.

    Yields:
        How many of them are this process's own.
    """
    cfg, threads = job.cfg, torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    options = cfg.search.model_dump()
    share = max(1, threads // cfg.search.workers)
    started = [
        context.Process(
            target=work,
            args=(cfg.path, job.folder, options, storage, share),
            kwargs={"goal": goal},
            daemon=True,
        )
        for _ in range(cfg.search.workers - 1)
    ]
    # Ctrl-C goes to every process of a terminal. It is the main one's to answer, which ends these.
    # The tracker would lift the mask if it were started under it.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in started:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    torch.set_num_threads(share)
    try:
        yield share
        for process in started:
            process.join()
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
                process.join(10)
        torch.set_num_threads(threads)


def work(
    path: Path,
    folder: Path,
    options: Mapping[str, Any],
    storage: str | None = None,
    threads: int | None = None,
    on_score: OnScore = lambda score, count: None,
    goal: Goal | None = None,
) -> Outcome:
    """Be one more worker of a run whose analysis is done; ends with the process that started it.

    Args:
        path: Of the config.
        folder: The run directory.
        options: Of the run, in the place of the config's ``search``.
        storage: URL of a shared Optuna storage; None: a journal in the run directory.
        threads: To compute with; None: ``OMP_NUM_THREADS``, else one for each core.
        on_score: Called after each plan.
        goal: See `run_search`.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    cfg = with_options(load_config(path), **options)
    job = open_job(cfg, folder, threads=threads)
    return run_search(job, sensitivity_of(job), storage, on_score, goal)


def _end_with(parent: BaseProcess) -> None:
    """A killed parent cannot end its workers; nothing is lost by ending in the middle of a plan."""
    parent.join()
    os._exit(1)
