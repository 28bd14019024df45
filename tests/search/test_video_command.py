"""The whole job on a small CNN with a GRU: scored, trained, and shipped for sequences and for single frames."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewriter import Plan, simulate
from rewriter.int8.onnx.session import Session
from search.config.schema import load_config
from search.export.streaming import open_stream, stream_scores
from search.job import open_job
from search.tasks.video import Video
from tests.search import small_video
from tests.search.cli.test_main import load, quantfix, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "small_video.py").write_text(Path(small_video.__file__).read_text())
    return write_config(
        tmp_path,
        task="video",
        model={"factory": "small_video:network"},
        data={"factory": "small_video:data"},
        search={"trials": 3, "max_macs": 3.0},
        finetune={"steps": 12, "check": 4, "batch": 8, "rate": 3e-3, "ema": 0.5, "loss": "labels"},
    )


@pytest.mark.slow
def test_what_is_shipped_is_what_was_trained(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert quantfix(monkeypatch, "run", config, "--out", out, "--finetune", "all-front") == 0
    front = load(out / "front.json")
    assert front["metric"] == "auc"
    assert all(p["finetuned"]["loss"] == "labels" for p in front["points"])
    point = next(p for p in front["points"] if p["plan"] == front["best"])
    assert quantfix(monkeypatch, "export", out, "--pick", "best") == 0

    data = small_video.data()
    x, y = data.evaluation.tensors
    session = Session(out / "export" / "model_int8.onnx", threads=1)
    (whole,) = session.run(x)
    shipped = Video().score([torch.from_numpy(whole)], y)
    assert shipped == pytest.approx(point["finetuned"]["int8"], abs=1e-9)
    stream, states, frames = open_stream(out / "export", threads=1)
    assert frames == 1
    scores = stream_scores(stream, x, states, frames)
    assert scores.shape == whole.shape
    assert Video().score([scores], y) == pytest.approx(shipped, abs=0.01)


def test_the_simulation_has_the_metric_of_the_runtime(config: Path, tmp_path: Path) -> None:
    job = open_job(load_config(config), tmp_path / "out")
    plan = Plan(())
    score = job.evaluator.score(plan, "whole")
    simulated = simulate(job.evaluator.assembled(plan).quantized, kernels=True)
    x, y = small_video.data().evaluation.tensors
    with torch.no_grad():
        found = Video().score([simulated(x)], y)
    assert score.engine == "onnxruntime" and score.metric is not None
    assert found == pytest.approx(score.metric, abs=0.002)
    assert score.original is not None and score.metric < score.original
