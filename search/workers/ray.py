"""The workers of a run on a Ray cluster: Ray says where they are, Optuna's storage what they do.

Each is a task that joins the search in the run directory, which all nodes see at the same path. Ray
starts it again on another node when its own dies; the plan that it was at is then tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from search.config.schema import ConfigError
from search.data.evaluation_set import Tick
from search.job import Job
from search.run_dir.files import RunError
from search.workers.processes import work

RETRIES = 5  # of a worker whose node died
LOOK_S = 1.0  # between two looks at how far the search is


def search_on_ray(job: Job, storage: str | None, address: str, tick: Tick) -> None:
    """Search until the config's budget is used up, with its number of workers on a cluster.

    Args:
        job: What to search; its analysis is done, and its run directory says so.
        storage: URL of a shared Optuna storage; None: a journal in the run directory.
        address: Of the cluster; ``auto``: the one that this machine is part of.
        tick: Told how many plans are scored.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster.
        RunError: a worker's nodes died too often.
    """
    options = job.cfg.search
    with _connected(address) as ray:
        there = ray.cluster_resources()
        for name, wanted in (("CPU", options.worker_cpus), ("GPU", options.worker_gpus)):
            if wanted > there.get(name, 0):
                raise ConfigError(
                    f"--ray {address}: a worker needs {wanted:g} {name} (search.worker_{name.lower()}s), "
                    f"the cluster has {there.get(name, 0):g}"
                )
        remote = ray.remote(
            num_cpus=options.worker_cpus, num_gpus=options.worker_gpus, max_retries=RETRIES
        )(work)
        words = (job.cfg.path, job.folder.absolute(), options.model_dump(), storage)
        waiting = [remote.remote(*words, options.worker_cpus) for _ in range(options.workers)]
        try:
            while waiting:
                done, waiting = ray.wait(waiting, timeout=LOOK_S)
                ray.get(done)
                job.records.refresh()
                tick(min(len(job.records), options.trials), options.trials)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as cause:
            raise RunError(
                f"--ray {address}: a worker died {RETRIES + 1} times: {cause}"
            ) from cause
        finally:
            for task in waiting:
                ray.cancel(task, force=True)


@contextmanager
def _connected(address: str) -> Generator[Any]:
    """Ray, connected to a cluster; a connection that was there before stays."""
    try:
        ray: Any = import_module("ray")
    except ImportError as cause:
        raise ConfigError("--ray: Ray is not installed: pip install 'quantfix[ray]'") from cause
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as cause:
            reason = str(cause).strip().splitlines()[0]
            raise ConfigError(f"--ray {address}: no cluster: {reason}") from cause
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()
