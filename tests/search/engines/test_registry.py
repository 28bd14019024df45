from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from rewriter import TARGETS, Plan, Quantized, profile, simulate, target, trace
from search.config.schema import ConfigError, load_config
from search.data.evaluation_set import load_samples
from search.engines import (
    ENGINES,
    EngineError,
    Session,
    engine_named,
    forms,
    scoring_engine,
    shipping_engines,
)
from search.engines.simulation import Simulation
from search.run_dir.scores import Records
from search.scoring.evaluator import RewriteEvaluator
from search.tasks.classification import Classification
from tests.search import small


class Sixth(Simulation):
    """A throw-away runtime: a class and a line in the registry are all that it takes."""

    name, version_of, absent = "sixth", "6.6", ""
    takes = frozenset({"per_tensor"})
    scores = ships = frozenset({"per_tensor"})
    form, file = "sixth", "model_int8.six"

    def version(self) -> str:
        return self.version_of

    def missing(self) -> str:
        return self.absent

    def emit(self, quantized: Quantized) -> Any:
        return simulate(quantized, kernels=True)

    def open(self, model: Any, threads: int, device: str) -> Session:
        return super().open(model, threads, device)


@pytest.fixture
def sixth(monkeypatch: pytest.MonkeyPatch) -> Sixth:
    engine = Sixth()
    monkeypatch.setattr("search.engines.registry.ENGINES", [engine, *ENGINES])
    return engine


def config(tmp_path: Path, text: str) -> Any:
    file = tmp_path / "c.yaml"
    file.write_text("task: classification\nmodel: {timm: resnet18}\ndata: {digits: 100}\n" + text)
    return load_config(file)


def test_every_target_has_an_engine_that_runs_here() -> None:
    for name in TARGETS:
        engine = scoring_engine(name)
        assert not engine.missing()
        assert engine.version()


def test_names_are_unique_and_every_file_has_a_form() -> None:
    names = [e.name for e in ENGINES]
    assert len(set(names)) == len(names)
    assert all(bool(e.form) == bool(e.file) for e in ENGINES)
    known = set(TARGETS)
    for engine in ENGINES:
        assert (engine.takes or known) <= known
        assert engine.scores | engine.ships <= (engine.takes or known)


def test_an_unknown_engine_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="'simulat'; did you mean 'simulate'"):
        engine_named("simulat")
    with pytest.raises(ConfigError, match="engine: unknown: 'simulat'"):
        config(tmp_path, "engine: [onnxruntime, simulat]\n")


def test_a_sixth_runtime_is_a_class_and_a_line(sixth: Sixth, tmp_path: Path) -> None:
    assert scoring_engine("per_tensor") is sixth
    assert scoring_engine("onnxruntime").name == "onnxruntime"
    assert sixth in shipping_engines("per_tensor")
    assert "sixth" in forms()
    assert config(tmp_path, "target: per_tensor\nengine: sixth\n").engines == ("sixth",)
    with pytest.raises(
        ConfigError, match=r"sixth does not run target tflite \(runs: per_tensor\)"
    ):
        config(tmp_path, "target: tflite\nengine: [sixth]\n")
    gm = trace(small.small(), torch.randn(2, 3, 16, 16))
    calibration = [torch.stack([small.data().calibration[i] for i in range(16)])]
    profile(gm, calibration)
    evaluate = RewriteEvaluator(
        gm=gm,
        scheme=target("per_tensor"),
        task=Classification(),
        calibration=calibration,
        samples=load_samples(small.data().evaluation),
        records=Records(tmp_path, "f"),
        engine="sixth",
    )
    score = evaluate(Plan(()))
    assert (score.engine, score.engine_version, score.error) == ("sixth", "6.6", None)


def test_the_next_engine_scores_where_one_is_not_installed(
    sixth: Sixth, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Sixth, "absent", "not installed: pip install sixth")
    with caplog.at_level(logging.WARNING):
        assert scoring_engine("per_tensor", ("sixth", "simulate")).name == "simulate"
    assert "pip install sixth: scored by simulate instead" in caplog.text
    with pytest.raises(EngineError, match="target per_tensor: engine sixth: not installed"):
        scoring_engine("per_tensor", ("sixth",))
    assert sixth not in shipping_engines("per_tensor")
