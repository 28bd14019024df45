from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewriter import Plan, profile, target, trace
from search.data.evaluation_set import chosen_on, load_samples, shuffled
from search.pareto.front import Front
from search.results import load_results
from search.run_dir.scores import Confirmations, Records, Samples, Score
from search.scoring.confirm import Confirmed, confirmed_front
from search.scoring.evaluator import RewriteEvaluator
from search.tasks.classification import Classification
from tests.search import small
from tests.search.cli.test_main import load, quantfix, write_config

SPLIT = {"trials": 8, "max_macs": 3.0, "confirmation": 0.25}


def evaluator(folder: Path, fraction: float) -> RewriteEvaluator:
    gm = trace(small.small(), torch.randn(2, 3, 16, 16))
    calibration = [torch.stack([small.data().calibration[i] for i in range(16)])]
    profile(gm, calibration)
    samples = load_samples(small.data().evaluation, order=shuffled(48))
    records = Records(folder, "f")
    kept = Confirmations.of(records, chosen_on(48, fraction)) if fraction else None
    return RewriteEvaluator(gm=gm, scheme=target("per_tensor"), task=Classification(),
                            calibration=calibration, samples=samples, records=records,
                            confirmations=kept, threads=1)  # fmt: skip


@pytest.mark.parametrize("plan", ["", "keep_float@dw_0", "merge_separable@dw_0"])
def test_the_parts_are_those_of_one_score_on_all_images(tmp_path: Path, plan: str) -> None:
    whole = evaluator(tmp_path / "all", 0)(Plan.parse(plan))
    split = evaluator(tmp_path / "split", 0.25)
    chosen, score = split(Plan.parse(plan)), split.score(Plan.parse(plan), "whole")
    assert split.confirmations is not None
    held = split.confirmations.held.get(plan)
    assert held is not None
    assert (chosen.samples, held.samples, score.samples) == (36, 12, 48)
    for name in ("metric", "damage", "original", "metric_float"):
        assert getattr(score, name) == pytest.approx(getattr(whole, name), abs=1e-12)
        mean = (36 * getattr(chosen, name) + 12 * getattr(held, name)) / 48
        assert getattr(score, name) == pytest.approx(mean)
    again = evaluator(tmp_path / "split", 0.25)
    assert again.score(Plan.parse(plan), "whole") == score


def test_how_many_are_held_back() -> None:
    assert chosen_on(550) == 367
    assert chosen_on(299) == 299
    assert chosen_on(299, 0.5) == 149
    assert chosen_on(550, 0.0) == 550
    assert chosen_on(2, 0.9) == 1


@pytest.mark.slow
def test_a_run_shows_its_front_on_all_images_and_on_either_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write_config(tmp_path, search=SPLIT), tmp_path / "out"
    assert quantfix(monkeypatch, "run", config, "--out", out) == 0
    assert "12 images held back" in " ".join(capsys.readouterr().out.split())
    front = load(out / "front.json")
    assert front["samples"] == 48
    assert front["selection_samples"] == 36
    assert front["confirmed"] is True
    for point in front["points"] + front["ties"] + front["references"]:
        parts = point["selection"], point["confirmation"]
        assert [p["samples"] for p in parts] == [36, 12]
        assert point["samples"] == 48
        for name in ("int8", "damage"):
            mean = (36 * parts[0][name] + 12 * parts[1][name]) / 48
            assert point[name] == pytest.approx(mean)
    base = load_results(out).baseline
    x, y = small.data().evaluation.tensors
    with torch.no_grad():
        assert base.float == pytest.approx(
            float((small.small()(x).argmax(1) == y).double().mean())
        )
    points = [(p["macs"], p["int8"]) for p in front["points"]]
    assert points == sorted(points)
    lines = (out / "scores.jsonl").read_text()
    assert quantfix(monkeypatch, "run", config, "--out", out, "-q") == 0
    assert (out / "scores.jsonl").read_text() == lines
    page = (out / "report.html").read_text()
    assert "chosen on 36 images and confirmed on 12 others" in page


@pytest.mark.slow
def test_a_front_that_is_not_confirmed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = write_config(tmp_path, search=SPLIT), tmp_path / "out"
    monkeypatch.setattr("search.optimize.confirm_front", lambda job, bars: None)
    assert quantfix(monkeypatch, "run", config, "--out", out, "-q") == 0
    front = load(out / "front.json")
    assert front["confirmed"] is False
    assert front["samples"] == 36
    assert all(p["samples"] == 36 for p in front["points"])


def part(plan: str, macs: int, right: np.ndarray) -> tuple[Score, Samples]:
    score = Score(plan=plan, macs=macs, metric=float(right.mean()), original=0.9,
                  damage=float(1 - right.mean()), samples=len(right))  # fmt: skip
    return score, Samples(damage=1 - right, metric=right)


def test_a_lucky_plan_is_seen_through_and_no_plan_comes_in(tmp_path: Path) -> None:
    """Planted: on the images that chose it "lucky" is best, on the others it is worst."""
    kept = Confirmations.of(Records(tmp_path, "f"), 300)
    known: dict[str, Confirmed] = {}
    scores: list[Score] = []
    for plan, macs, first, then in (("", 10, 200, 100), ("lucky@a", 11, 270, 20)):
        rows = [np.arange(300) < first, np.arange(150) < then]
        values = [r.astype(float) for r in rows]
        parts = [part(plan, macs, v) for v in (*values, np.concatenate(values))]
        kept.whole.add(*parts[2])
        known[plan] = Confirmed(*(s for s, _ in parts))
        scores.append(parts[0][0])
    front = confirmed_front(Front(tuple(scores)), known, kept)
    assert front is not None
    assert [s.plan for s in front.all()] == [""]
    assert known["lucky@a"].luck() == pytest.approx(100 * (0.9 - 20 / 150))
    assert confirmed_front(Front(tuple(scores)), {"": known[""]}, kept) is None


def test_the_split_is_an_ingredient_of_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    for fraction, said in ((0.25, ""), (0.5, "confirmation changed since the last run")):
        config: Any = write_config(tmp_path, search=SPLIT | {"confirmation": fraction})
        assert quantfix(monkeypatch, "run", config, "--out", out, "-q", "--trials", 1) == 0
        assert said in caplog.text
