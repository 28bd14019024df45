"""Whatever happens to a candidate, to the disk or to the process, nothing is lost or counted twice."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from rewriter import Plan
from search.config.schema import load_config
from search.job import open_job
from search.run import note_run, run_search, sensitivity_of
from search.run_dir.files import read_json
from search.run_dir.scores import fingerprint
from search.scoring import bench
from search.scoring.child_process import own_locks, possible
from search.study.storage import journal
from tests.search.cli.test_main import load, quantfix, write_config

needs_fork = pytest.mark.skipif(not possible("cpu"), reason="needs Linux without CUDA")


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = journal(folder / "journal.log")
    (name,) = (s.study_name for s in optuna.get_all_study_summaries(storage=storage))
    return optuna.load_study(study_name=name, storage=storage).trials


def scores(folder: Path) -> dict[str, dict[str, Any]]:
    """The scores on the images that choose, by plan; each plan stands in the file once."""
    known = fingerprint(read_json(folder / "run.json")["parts"])
    lines = map(json.loads, (folder / "scores.jsonl").read_text().splitlines())
    found = [line["score"] for line in lines if line["fingerprint"] == known]
    assert len({s["plan"] for s in found}) == len(found)
    return {s["plan"]: s for s in found}


def check_whole(folder: Path, plans: int) -> None:
    """Every plan is scored once and told once, and nothing is left running."""
    known = scores(folder)
    assert len(known) == plans
    ended = [t for t in trials(folder) if "counts" in t.user_attrs]
    assert sorted(t.user_attrs["plan"] for t in ended) == sorted(known)
    assert all(t.state.is_finished() for t in trials(folder))
    assert list((folder / "workers").iterdir()) == []


@pytest.mark.slow
@needs_fork
def test_the_search_goes_on_past_plans_that_fail_in_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang() -> None:
        while True:
            time.sleep(60)

    def too_much() -> None:
        torch.empty(1 << 60)

    # the first rungs of the ladder, which every search tries
    faults: dict[str, Callable[[], Any]] = {
        "split_range_3@stem_0": lambda: 1 / 0,
        "refine_ranges@model": hang,
        "equalize@model": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "correct_bias@model": too_much,
    }
    whole, opened = bench.assemble, bench.Bench.opened_and_read
    spoilt = "replace_relu6@model"
    running: list[str] = []

    def assemble(gm: Any, plan: Plan, *rest: Any) -> Any:
        running[:] = [str(plan)]
        if str(plan) in faults:
            faults[str(plan)]()
        return whole(gm, plan, *rest)

    def spoiling(self: Any, quantized: Any, model: Any) -> Any:
        run, found = opened(self, quantized, model)
        factor = math.nan if spoilt in running[0].split() else 1.0
        return lambda x: [o * factor for o in run(x)], found

    monkeypatch.setattr(bench, "assemble", assemble)
    monkeypatch.setattr(bench.Bench, "opened_and_read", spoiling)
    search = {"trials": 24, "max_macs": 3.0, "candidate_timeout": 5.0, "max_float_layers": 2}
    search["max_latency_ratio"] = 0  # a tiny network's time says nothing
    config, out = write_config(tmp_path, search=search), tmp_path / "out"
    assert quantfix(monkeypatch, "run", config, "--out", out, "-q") == 0
    known = scores(out)
    check_whole(out, len(known))
    said = {plan: known[plan]["error"] for plan in faults if plan in known}
    assert said.pop("refine_ranges@model", "took longer than 5 s").startswith(
        "took longer than 5 s"
    )
    assert said.pop("split_range_3@stem_0", "ZeroDivisionError").startswith("ZeroDivisionError")
    assert "killed by SIGKILL" in said.pop("equalize@model", "killed by SIGKILL")
    assert "memory" in said.pop("correct_bias@model", "memory")
    assert len(known.keys() & faults.keys()) >= 3
    bad = [s for plan, s in known.items() if spoilt in plan.split() and plan not in faults]
    assert bad
    assert all("NaN" in s["error"] for s in bad)
    front = load(out / "front.json")
    lost = [s for s in known.values() if s["error"] is not None]
    assert front["plans_failed"] == len(lost) == sum(front["failures"].values())
    assert front["failures"]["RewriteError"] == len(bad)
    assert len({s["traceback"] for s in lost}) == len(lost)
    assert all((out / s["traceback"]).is_file() for s in lost)
    assert "plans failed, by kind: " in (out / "report.html").read_text()
    assert all(known[p["plan"]]["error"] is None for p in front["points"])


@pytest.mark.slow
def test_a_run_that_filled_the_disk_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    assert quantfix(monkeypatch, "run", config, "--out", tmp_path / "whole", "-q") == 0
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "whole" / "journal.log").stat().st_size
    for share in (0.1, 0.5, 0.9):
        # no file may grow beyond this: what a full disk says, but to this process alone
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), before[1]))
        try:
            assert quantfix(monkeypatch, "run", config, "--out", out, "-q") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        said = (
            capsys.readouterr().err
        )  # the second: of a file of ONNX Runtime's that was cut short
        assert "File too large" in said or "No space left on device" in said
    assert quantfix(monkeypatch, "run", config, "--out", out, "-q") == 0
    check_whole(out, 8)
    assert points(out) == points(tmp_path / "whole")


def points(folder: Path) -> list[Any]:
    front = load(folder / "front.json")
    kept = ("plan", "macs", "int8", "int8_interval", "damage")
    return [[p[key] for key in kept] for p in front["points"] + front["ties"]]


def attempt(config: Path, folder: Path) -> int:
    """Fork a process that runs a search; libraries and all need not be loaded again."""
    own_locks()
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        job = open_job(load_config(config), folder, threads=1)
        sensitivity = sensitivity_of(job)
        note_run(job)
        run_search(job, sensitivity)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.slow
@needs_fork
def test_twenty_kills_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = {"trials": 30, "max_macs": 3.0, "max_float_layers": 2, "seed": 3}
    config = write_config(tmp_path, search=search)
    monkeypatch.syspath_prepend(str(tmp_path))
    began = time.monotonic()
    assert os.waitpid(attempt(config, tmp_path / "whole"), 0)[1] == 0
    taken = time.monotonic() - began
    plans = len(scores(tmp_path / "whole"))
    out, chance = tmp_path / "out", random.Random(7)
    kills, until, found = 0, 0, 0
    while kills < 20:
        # after so many more plans, then anywhere within one
        child = attempt(config, out)
        goal = until
        while (
            _lines(out) < goal
            and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 2 * taken / plans))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), "the run ended before it was killed so often"
        kills += 1
        found += any(not t.state.is_finished() for t in _trials_of(out))
        until = min(_lines(out) + chance.choice((0, 1, 2)), plans - 2)
    assert found  # a trial was running when it was killed, or this shows nothing
    for folder in (out, tmp_path / "whole"):
        assert quantfix(monkeypatch, "run", config, "--out", folder, "-q") == 0
    check_whole(out, plans)
    assert list(scores(out)) == list(scores(tmp_path / "whole"))
    assert points(out) == points(tmp_path / "whole")


def _lines(folder: Path) -> int:
    path = folder / "scores.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return trials(folder) if (folder / "journal.log").exists() else []
