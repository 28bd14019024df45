"""A run whose candidates are scored on LiteRT, through the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewriter import Plan
from search.config.schema import load_config
from search.engines.litert import LiteRT
from search.job import open_job
from tests.search.cli.test_main import load, quantfix, write_config

pytest.importorskip("ai_edge_litert")


def test_candidates_are_scored_on_litert(tmp_path: Path) -> None:
    job = open_job(load_config(write_config(tmp_path, target="tflite")), tmp_path / "run")
    plain, kept = (job.evaluator(Plan.parse(t)) for t in ("", "keep_float@dw_0 keep_float@pw"))
    assert (plain.engine, plain.error, kept.error) == ("litert", None, None)
    assert plain.engine_version == LiteRT().version()
    assert kept.damage is not None and plain.damage is not None
    assert kept.damage < plain.damage


def test_without_litert_the_simulation_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(LiteRT, "missing", lambda self: "not here")
    job = open_job(load_config(write_config(tmp_path, target="tflite")), tmp_path / "run")
    assert job.evaluator.engine == "simulate"
    assert "engine litert: not here: scored by simulate instead" in caplog.text


@pytest.mark.slow
def test_a_run_and_its_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = {"trials": 6, "seed": 0}
    config = write_config(tmp_path, target="tflite", engine=["litert", "simulate"], search=search)
    out = tmp_path / "out"
    assert quantfix(monkeypatch, "run", config, "--out", out, "--quiet") == 0
    front = load(out / "front.json")
    assert front["engine"] == "litert"
    for point in front["points"]:
        assert point["confirmed"]["litert"]["damage"] == pytest.approx(point["damage"])
    capsys.readouterr()
    assert quantfix(monkeypatch, "export", out, "--compare", "--to", "onnx,trt") == 0
    folder = out / "export"
    assert (folder / "model_int8.tflite").exists() and (folder / "model_int8.tflite.md").exists()
    files = json.loads((folder / "files.json").read_text())["files"]
    assert set(files) == {"onnx", "trt"}
    assert files["onnx"]["target"] == "onnxruntime"
    rows = load(folder / "comparison.json")["values"]
    assert max(r["differs"] for r in rows) < 0.5
    assert quantfix(monkeypatch, "export", out, "--to", "caffe") == 2
