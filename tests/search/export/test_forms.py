from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from rewriter import Plan, profile, target, trace
from search.data.evaluation_set import load_samples
from search.engines import EngineError, engine_named, forms
from search.engines.litert import LiteRT
from search.export.forms import checked_forms, export_forms
from search.run_dir.scores import Records, Score
from search.scoring import deployed
from search.scoring.deployed import disagree, read_deployed, score_deployed
from search.scoring.evaluator import RewriteEvaluator
from search.tasks.classification import Classification
from tests.search import small

HERE = [f for f in ("onnx", "openvino", "tflite", "trt") if f in forms()]
INSTALLED = [f for f in HERE if f in ("onnx", "trt")] + [
    e for e, n in (("openvino", "openvino"), ("tflite", "litert")) if not engine_named(n).missing()
]


def evaluator(folder: Path, name: str = "onnxruntime", engine: str = "onnxruntime") -> Any:
    gm = trace(small.small(), torch.randn(2, 3, 16, 16))
    calibration = [torch.stack([small.data().calibration[i] for i in range(16)])]
    profile(gm, calibration)
    return RewriteEvaluator(
        gm=gm,
        scheme=target(name),
        task=Classification(),
        calibration=calibration,
        samples=load_samples(small.data().evaluation),
        records=Records(folder, "f"),
        engine=engine,
        threads=1,
    )


@pytest.mark.slow
def test_every_form_is_written_run_and_described(tmp_path: Path) -> None:
    evaluate = evaluator(tmp_path / "run")
    written = export_forms(evaluate, Plan.parse("merge_separable@dw_0"), tmp_path, INSTALLED)
    files = json.loads((tmp_path / "files.json").read_text())["files"]
    assert list(files) == INSTALLED
    for w in written:
        assert w.file.stat().st_size == w.size
        assert w.score.damage is not None and w.score.damage < 0.5
        assert w.latency_ms > 0
        card = w.card.read_text()
        assert w.file.name in card and "scale, zero point" in card
        assert "16x16" in card
    trt = onnx.load(tmp_path / "model_int8_trt.onnx")
    assert not [f for w in written if w.form == "trt" for f in w.findings if f.code == "tensorrt"]
    assert not any(i.data_type == onnx.TensorProto.INT32 for i in trt.graph.initializer)


def test_the_figures_are_those_of_the_file(tmp_path: Path) -> None:
    evaluate = evaluator(tmp_path / "run")
    (written,) = export_forms(evaluate, Plan(()), tmp_path, ["onnx"])
    session = onnxruntime.InferenceSession(str(written.file), providers=["CPUExecutionProvider"])
    x, y = small.data().evaluation.tensors
    name = session.get_inputs()[0].name
    found = np.concatenate([np.asarray(session.run(None, {name: r[None]})[0]) for r in x.numpy()])
    assert written.score.metric == pytest.approx(float((found.argmax(1) == y.numpy()).mean()))


@pytest.mark.skipif("tflite" not in INSTALLED, reason="LiteRT is not installed")
def test_the_page_loads_a_tflite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = evaluator(tmp_path / "run")
    (written,) = export_forms(evaluate, Plan(()), tmp_path, ["tflite"])
    card = written.card.read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    x, _ = small.data().evaluation.tensors
    space: dict[str, Any] = {"images": x[:1].permute(0, 2, 3, 1).contiguous().numpy()}
    exec(code, space)
    from rewriter.int8.litert import Session

    session = Session(written.file.read_bytes(), kernels="xnnpack")  # an interpreter's default
    assert np.array_equal(space["outputs"][0], session.run(x[:1])[0].numpy())


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(EngineError, match=r"--to: unknown form: 'caffe' \(known: tflite, onnx"):
        checked_forms(["onnx", "caffe"])


def test_a_form_without_its_runtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiteRT, "missing", lambda self: "not here: pip install it")
    with pytest.raises(EngineError, match="--to tflite: not here: pip install it"):
        checked_forms(["tflite"])


def test_a_broken_rule_of_tensorrt_is_seen(tmp_path: Path) -> None:
    evaluate = evaluator(tmp_path / "run")
    trt, plain = engine_named("tensorrt"), evaluate.assembled(Plan(())).quantized
    found = {f.message for f in trt.lint(plain, engine_named("onnxruntime").emit(plain))}
    assert any("int32: only INT8" in m for m in found)
    assert any("uint8: only INT8" in m for m in found)
    assert any("zero point is not 0" in m for m in found)


@pytest.mark.skipif("tflite" not in INSTALLED, reason="LiteRT is not installed")
def test_plans_are_confirmed_on_the_runtime_that_ships(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate = evaluator(tmp_path, "tflite", "simulate")
    score = evaluate(Plan(()))
    entry = score_deployed(evaluate, tmp_path, [score])[""]["litert"]
    assert entry["damage"] == pytest.approx(score.damage, rel=0.3, abs=2e-3)
    assert read_deployed(tmp_path, "f")[""]["litert"] == entry
    assert read_deployed(tmp_path, "another run") == {}
    # a score that the runtime does not reproduce is said, with what is guilty or that nothing is
    (tmp_path / deployed.FILE).unlink()
    wrong = replace(score, interval=(1.5, 1.6))
    with caplog.at_level(logging.WARNING):
        found = score_deployed(evaluate, tmp_path, [wrong])[""]["litert"]
    assert "guilty" in found
    assert "litert gives" in caplog.text


def test_disagreement_is_judged_by_the_interval_or_the_damage() -> None:
    score = Score("", 1, metric=0.7, interval=(0.68, 0.72), damage=0.1)
    assert not disagree(score, Score("", 1, metric=0.69, damage=0.5))
    assert disagree(score, Score("", 1, metric=0.66, damage=0.1))
    bare = Score("", 1, damage=0.1)
    assert not disagree(bare, Score("", 1, damage=0.12))
    assert disagree(bare, Score("", 1, damage=0.2))
