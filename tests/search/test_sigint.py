"""Ctrl-C, as a terminal sends it to a running command: exit 130, what to type, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.search.refused import write_config

ROOT = Path(__file__).resolve().parents[2]
SLOW = """
import time
from small import *
class Slow(Unlabeled):
    def __getitem__(self, index):
        time.sleep({pause})
        return self.x[index]
def slow():
    found = data()
    return Splits(Slow(found.calibration.x), found.evaluation)
"""


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A command in a process group of its own, as a terminal has it."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "search.cli", *words],
        cwd=folder, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(folder: Path, *words: str) -> None:
    process = started(folder, *words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err


def interrupted(process: subprocess.Popen[str]) -> str:
    """What is printed after Ctrl-C, which goes to the whole group; nothing is left running."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    return " ".join((out + err).split())


def wait_for(path: Path, process: subprocess.Popen[str], lines: int = 1) -> None:
    """Until a file has so many lines."""
    until = time.monotonic() + 300
    while not path.exists() or len(path.read_bytes().splitlines()) < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_while_the_calibration_images_are_read(tmp_path: Path) -> None:
    config = write_config(tmp_path, data={"factory": "slowly:slow"})
    touched = tmp_path / "began"
    text = SLOW.format(pause=1) + f"\nopen({str(touched)!r}, 'w').write('x')\n"
    (tmp_path / "slowly.py").write_text(text)
    process = started(tmp_path, "run", str(config), "--out", "run")
    wait_for(touched, process)
    time.sleep(2)
    assert f"To go on: quantfix run {config} --out run" in interrupted(process)


@pytest.mark.slow
def test_in_the_analysis(tmp_path: Path) -> None:
    config = write_config(tmp_path, data={"factory": "small:data", "args": {"count": 4000}})
    process = started(tmp_path, "analyze", str(config), "--exact", "--out", "run")
    journal = tmp_path / "run" / "sensitivity.jsonl"
    wait_for(journal, process, 2)
    assert "To go on: quantfix analyze" in interrupted(process)
    before = journal.read_text().splitlines()
    finished(tmp_path, "analyze", str(config), "--exact", "--out", "run", "-q")
    assert journal.read_text().splitlines()[: len(before)] == before


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_in_the_search(tmp_path: Path, workers: str) -> None:
    config = write_config(tmp_path, search={"trials": 500, "max_macs": 3.0})
    process = started(
        tmp_path, "run", str(config), "--out", "run", "--workers", workers, "--trials", "500"
    )
    scores = tmp_path / "run" / "scores.jsonl"
    wait_for(scores, process, 6)
    said = interrupted(process)
    assert f"To go on: quantfix run {config} --out run --workers {workers} --trials 500" in said
    lines = scores.read_text().splitlines()
    plans = [json.loads(line)["score"]["plan"] for line in lines]
    assert len(plans) == len(set(plans)) >= 6
    assert (tmp_path / "run" / "front.json").exists()
    count = str(len(plans) + 1)
    finished(tmp_path, "run", str(config), "--out", "run", "--trials", count, "-q")
    assert scores.read_text().splitlines()[: len(lines)] == lines
