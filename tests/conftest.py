"""Settings of every test: one thread in each process, however the machine is set up."""

from __future__ import annotations

import os

# Before anything imports torch or NumPy, which read these when they are loaded; processes that
# tests start inherit them. The networks here are small: with more threads than one, each operator
# waits for the others' threads, and several test processes at once wait for all of them.
for variable in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM"):
    os.environ[f"{variable}_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

# times of kernels are kept for the tests alone; processes that they start find them too
os.environ.setdefault("QUANTFIX_CACHE", tempfile.mkdtemp(prefix="quantfix-tests-"))

ROOT = Path(__file__).resolve().parents[1]
MOST_WORKERS = 8  # each holds torch, up to 1.5 GiB

# if a plugin was faster and loaded torch before this file
torch.set_num_threads(1)


def pytest_xdist_auto_num_workers() -> int:
    """What ``-n auto`` means: a process for each core we may use; none besides on a single core."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return 0 if cores == 1 else min(cores, MOST_WORKERS)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of trained networks and images; tests that need it are skipped without it."""
    folder = Path(os.environ.get("QUANTFIX_ASSETS") or ROOT.parent / "shared" / "assets")
    if not (folder / "zoo.py").is_file():
        pytest.skip(f"no assets at {folder}; QUANTFIX_ASSETS says where they are")
    return folder
