"""Fine-tuning from the command line: what the front says of it, what is shipped, and the table of the first block."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch

from rewriter import Plan, Quantized, RewriteError, simulate, trace
from search.config.schema import Config, load_config
from search.finetune.block_table import first_separable
from search.finetune.run import Finetuner, control_of
from search.job import open_job
from tests.search import small
from tests.search.cli.test_main import load, quantfix, write_config

TRAINED = {"steps": 10, "check": 5, "batch": 8, "rate": 3e-3, "ema": 0.5}


def write(folder: Path, **changes: Any) -> Path:
    return write_config(
        folder,
        search={"trials": 4, "max_macs": 3.0, "confirmation": 0.25},
        finetune={**TRAINED, **changes},
    )


def measured(file: Path) -> float:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    x, y = small.data().evaluation.tensors
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return float(np.mean(logits.argmax(1) == y.numpy()))


@pytest.mark.slow
def test_a_run_trains_says_so_and_ships_the_trained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write(tmp_path), tmp_path / "out"
    assert quantfix(monkeypatch, "run", config, "--out", out, "--finetune", "best") == 0
    assert "Fine-tuned: loss distillation, quantization learned" in capsys.readouterr().out
    front = load(out / "front.json")
    (point,) = [p for p in front["points"] + front["ties"] if "finetuned" in p]
    assert point["plan"] == front["best"]
    tuned = point["finetuned"]
    for part in (tuned, tuned["before"], tuned["control"], tuned["control"]["before"]):
        assert part["int8"] is not None and part["float"] is not None and part["damage"] >= 0
        assert part["samples"] == 48 and part["engine"] == "onnxruntime"
    assert tuned["before"]["int8"] == point["int8"]
    assert tuned["before"]["damage"] == point["damage"]
    assert tuned["control"]["plan"] == str(control_of(Plan.parse(point["plan"])))
    assert tuned["control"]["damage"] < 0.8 * tuned["control"]["before"]["damage"]
    assert not list((out / "finetune").iterdir())

    lines = (out / "scores.jsonl").read_text()
    assert quantfix(monkeypatch, "run", config, "--out", out, "--finetune", "best") == 0
    assert (out / "scores.jsonl").read_text() == lines
    assert load(out / "front.json") == front

    capsys.readouterr()
    assert quantfix(monkeypatch, "export", out, "--pick", "best") == 0
    assert "with the fine-tuned weights" in capsys.readouterr().out
    assert measured(out / "export" / "model_int8.onnx") == pytest.approx(tuned["int8"])
    changes = (out / "export" / "CHANGES.md").read_text()
    assert "fine-tuned" in changes
    assert tuned["control"]["plan"] or tuned["control"]["damage"] < front["baseline"]["damage"]
    row = next(line for line in changes.splitlines() if line.startswith("| int8, as it was"))
    assert row.split("|")[5].strip() == f"{front['baseline']['damage']:.4g}", "it was trained"
    plain = tmp_path / "plain"
    assert quantfix(monkeypatch, "export", out, "--untrained", "--out", plain) == 0
    assert measured(plain / "model_int8.onnx") == pytest.approx(point["int8"])
    a, b = (safetensors.torch.load_file(f / "model.safetensors") for f in (out / "export", plain))
    assert a.keys() == b.keys()
    moved = [k for k in a if a[k].is_floating_point() and not torch.equal(a[k], b[k])]
    assert bool(moved) == (tuned["kept"] > 0)


@pytest.mark.parametrize("quantization", ["float", "fixed"])
def test_other_ways_of_training_are_scored_and_kept(tmp_path: Path, quantization: str) -> None:
    cfg = load_config(write(tmp_path, quantization=quantization))
    job = open_job(cfg, tmp_path / "out")
    tuner = Finetuner(job, cfg.finetune)
    before = job.evaluator.score(Plan(()), "whole")
    after, trained = tuner.score(Plan(()))
    assert after.error is None and after.samples == before.samples == 48
    assert trained.steps == 10
    again, same = Finetuner(open_job(cfg, tmp_path / "out"), cfg.finetune).score(Plan(()))
    assert (again, same) == (after, trained)
    first, other = (t.network(Plan(()))[0].quantized for t in (tuner, tuner_of(cfg, tmp_path)))
    x = small.data().evaluation.tensors[0]
    assert torch.equal(simulate(first)(x), simulate(other)(x))
    if quantization == "fixed":
        untrained = job.evaluator.assembled(Plan(())).quantized
        assert after.damage is not None and before.damage is not None
        assert (after.damage < before.damage) == (not same_weights(first, untrained))


def tuner_of(cfg: Config, folder: Path) -> Finetuner:
    """That of a later process, which finds what was trained."""
    return Finetuner(open_job(cfg, folder / "out"), cfg.finetune)


def same_weights(a: Quantized, b: Quantized) -> bool:
    left, right = a.gm.state_dict(), b.gm.state_dict()
    return all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.slow
def test_the_table_of_a_labeled_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labeled.py").write_text(
        "import small\n"
        "def data():\n"
        "    d = small.data()\n"
        "    return small.Splits(d.calibration, d.evaluation, small.data(seed=5, count=32).evaluation)\n"
    )
    config = write_config(
        tmp_path, data={"factory": "labeled:data"}, finetune={**TRAINED, "quantization": "fixed"}
    )
    out = tmp_path / "out"
    assert quantfix(monkeypatch, "table", config, "--out", out, "--steps", "6") == 0
    printed = capsys.readouterr().out
    table = load(out / "table.json")
    names = [r["row"] for r in table["rows"]]
    assert names == [
        "as it is",
        "replaced",
        "replaced + free rewrites",
        "control: free rewrites",
        "replaced + distillation",
        "control: distillation",
        "replaced + training with labels",
        "control: training with labels",
    ]
    for row in table["rows"]:
        assert row["row"] in printed
        assert row["error"] is None
        assert row["relative"]["int8"] == pytest.approx(100 * row["int8"] / table["float"])
        assert (table["step"] in row["plan"]) == row["row"].startswith("replaced")
        assert row["control"] == row["row"].startswith("control")
    assert table["rows"][1]["relative"]["macs"] > 100
    lines = (out / "scores.jsonl").read_text()
    assert quantfix(monkeypatch, "table", config, "--out", out, "--steps", "6", "--quiet") == 0
    assert (out / "scores.jsonl").read_text() == lines
    assert load(out / "table.json") == table


@pytest.mark.slow
def test_without_labels_the_table_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, finetune={**TRAINED, "steps": 2})
    assert quantfix(monkeypatch, "table", config, "--out", tmp_path / "out") == 0
    assert "left out: training with labels: the training data have no labels" in (
        capsys.readouterr().out
    )


def test_labels_that_are_not_there_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, loss="labels", plans="best")
    assert quantfix(monkeypatch, "run", config, "--out", tmp_path / "out") == 2
    assert "finetune.loss: labels: data.calibration has none" in capsys.readouterr().err
    assert load(tmp_path / "out" / "front.json")["points"], "the search's own result was lost"


@pytest.mark.slow
def test_a_run_killed_while_it_trains_goes_on_to_the_same_result(tmp_path: Path) -> None:
    config = write(tmp_path, steps=40, patience=100)
    words = [
        sys.executable,
        "-m",
        "search.cli",
        "run",
        config,
        "--finetune",
        "best",
        "--quiet",
    ]
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [*map(str, words), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, env=environment)
    folder = tmp_path / "killed" / "finetune"
    while not list(folder.glob("*.pt")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, env=environment, check=True)
    subprocess.run([*command[:-1], str(tmp_path / "whole")], env=environment, check=True)
    killed, whole = (load(tmp_path / name / "front.json") for name in ("killed", "whole"))
    found = [[p.get("finetuned") for p in f["points"] + f["ties"]] for f in (killed, whole)]
    assert any(found[0])
    assert found[0] == found[1]
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("plan", "control"),
    [
        ("", None),
        ("equalize@model correct_bias@model", ""),
        ("merge_separable@dw_0", ""),
        ("merge_separable@dw_0 correct_bias@model", "correct_bias@model"),
    ],
)
def test_the_control_has_the_free_steps_alone(plan: str, control: str | None) -> None:
    found = control_of(Plan.parse(plan))
    assert (None if found is None else str(found)) == control


def test_the_first_separable_convolution_is_found() -> None:
    gm = trace(small.small(), torch.randn(2, 3, 16, 16))
    assert str(first_separable(gm)) == "merge_separable@dw_0"
    plain = trace(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(RewriteError, match="it has no depthwise layer"):
        first_separable(plain)
