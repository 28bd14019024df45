from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch

from search.cli import main as cli
from tests.search.refused import SMALL

HERE = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def write_config(folder: Path, name: str = "small", **changes: Any) -> Path:
    content = SMALL | {"search": {"trials": 8, "max_macs": 3.0, "seed": 0}} | changes
    (folder / "small.py").write_text((HERE / "small.py").read_text())
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))
    return path


def quantfix(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["quantfix", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_run_writes_a_true_front_resumes_and_exports(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert quantfix(monkeypatch, "run", config, "--out", out) == 0
    printed = capsys.readouterr().out
    front = load(out / "front.json")
    assert front["baseline"].keys() >= {"float", "int8", "macs", "damage"}
    points = [(p["macs"], p["int8"]) for p in front["points"]]
    assert points
    assert points == sorted(points)
    assert all(p["engine"] == "onnxruntime" for p in front["points"])
    assert "plain int8" in printed
    assert (out / "report.html").exists()
    sensitivity = load(out / "sensitivity.json")
    assert {row["layer"] for row in sensitivity["layers"][:2]} == {"dw.0", "pw"}
    causes = {row["layer"]: row["causes"] for row in sensitivity["layers"]}
    assert any("weight" in cause for cause in causes["dw.0"])

    lines = (out / "scores.jsonl").read_text()
    assert quantfix(monkeypatch, "run", config, "--out", out, "--quiet") == 0
    assert (out / "scores.jsonl").read_text() == lines
    assert capsys.readouterr().out == ""

    assert quantfix(monkeypatch, "front", out) == 0
    assert load(out / "front.json") == front

    assert quantfix(monkeypatch, "export", out, "--pick", "best") == 0
    check_export(
        out / "export",
        next(p for p in front["points"] + front["ties"] if p["plan"] == front["best"]),
    )


def check_export(folder: Path, point: dict[str, Any]) -> None:
    """The file measures what was promised; the source loads without the package."""
    sys.path.insert(0, str(HERE))
    try:
        from small import data  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(HERE))
    session = onnxruntime.InferenceSession(
        str(folder / "model_int8.onnx"), providers=["CPUExecutionProvider"]
    )
    x, y = data().evaluation.tensors
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.mean(logits.argmax(1) == y.numpy()) == pytest.approx(point["int8"])

    namespace: dict[str, Any] = {}
    source = (folder / "model.py").read_text()
    assert "rewriter" not in source.replace("rewritten", "")
    exec(source, namespace)
    model = namespace["load"](str(folder / "model.safetensors"))
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()
    assert (
        safetensors.torch.load_file(folder / "model.safetensors").keys()
        == model.state_dict().keys()
    )
    ranges = load(folder / "ranges.json")
    assert ranges["values"]
    changes = (folder / "CHANGES.md").read_text()
    assert f"{point['damage']:.4g}" in changes


def test_analyze_check_and_sites_say_what_they_found(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    assert quantfix(monkeypatch, "check", config) == 0
    printed = capsys.readouterr().out
    assert "M MACs" in printed
    assert "87.50% on the first 48 samples" in printed
    assert not (tmp_path / "runs").exists()
    assert quantfix(monkeypatch, "sites", config) == 0
    assert "keep_float@dw_0" in capsys.readouterr().out
    assert quantfix(monkeypatch, "analyze", config) == 0
    assert (tmp_path / "runs" / "small" / "sensitivity.json").exists()
    picture = (tmp_path / "runs" / "small" / "sensitivity.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg") and picture.rstrip().endswith("</svg>")
    assert "dw.0" in capsys.readouterr().out


def test_fix_exports_the_cheapest_plan_that_meets_the_goal(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert (
        quantfix(
            monkeypatch, "fix", config, "--max-drop", 100, "--max-macs", 1, "--out", out, "-q"
        )
        == 0
    )
    assert "Nothing was changed" in (out / "fixed" / "CHANGES.md").read_text()
    assert len((out / "scores.jsonl").read_text().splitlines()) == 1


def test_fix_keeps_the_best_so_far_and_exits_1_where_nothing_meets_the_goal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path, search={"trials": 2}, model={"factory": "small:small", "args": {"seed": 3}}
    )
    out = tmp_path / "out"
    code = quantfix(
        monkeypatch, "fix", config, "--max-drop", 0, "--max-macs", 0.5, "--out", out, "-q"
    )
    assert code == 1
    assert "goal not met" in capsys.readouterr().err
    assert (out / "fixed" / "model_int8.onnx").exists()


@pytest.mark.slow
def test_without_labels_the_damage_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, data={"factory": "small:data", "args": {"labels": False}})
    out = tmp_path / "out"
    assert quantfix(monkeypatch, "run", config, "--out", out, "--quiet") == 0
    front = load(out / "front.json")
    assert front["objective"] == "damage"
    assert front["baseline"]["float"] is None
    assert all(p["int8"] is None and p["damage"] >= 0 for p in front["points"])
    assert quantfix(monkeypatch, "fix", config, "--max-drop", 1, "--out", out, "--quiet") == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"factory": "small:data", "args": {"broken": True}}}, "in the user's data set"),
        ({"target": "onnxrutime"}, "did you mean 'onnxruntime'"),
        (
            {
                "data": {"factory": "small:data", "args": {"labels": False}},
                "search": {"objective": "metric"},
            },
            "no labels",
        ),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, **changes)
    assert quantfix(monkeypatch, "run", config, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert said in " ".join(message.split())
    assert "Traceback" not in message


def test_a_directory_of_another_model_is_refused(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert quantfix(monkeypatch, "analyze", config, "--out", out, "-q") == 0
    other = write_config(tmp_path, "other", model={"factory": "small:small", "args": {"seed": 1}})
    assert quantfix(monkeypatch, "run", other, "--out", out) == 2
    assert "holds a run of another model" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["front", "nowhere"], "no such file"),
        (["export", "nowhere", "--pick", "best"], "no such file"),
        (["worker", "nowhere"], "no such file"),
        (["run", "nowhere.yaml"], "cannot be read"),
        (["run", "x.yaml", "--trials", "0"], "trials"),
        (["frnt"], "frnt"),
    ],
)
def test_bad_words_are_one_message_and_exit_2(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert quantfix(monkeypatch, *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_two_workers_score_every_plan_once(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    code = quantfix(monkeypatch, "run", config, "--out", out, "--workers", 2, "--trials", 12, "-q")
    assert code == 0
    plans = [
        json.loads(line)["score"]["plan"]
        for line in (out / "scores.jsonl").read_text().splitlines()
    ]
    assert len(plans) == len(set(plans)) == 12
    assert list((out / "workers").iterdir()) == []
    assert quantfix(monkeypatch, "worker", out, "-q") == 0
    assert len((out / "scores.jsonl").read_text().splitlines()) == 12


def test_ctrl_c_says_what_to_type_to_go_on(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("search.optimize.run_search", stop)
    assert quantfix(monkeypatch, "run", config, "--out", tmp_path / "out", "-q") == 130
    assert f"To go on: quantfix run {config} --out" in capsys.readouterr().err
    assert (tmp_path / "out" / "front.json").exists()


@pytest.mark.parametrize(
    "command", ["check", "analyze", "sites", "run", "front", "export", "fix", "worker", "demo"]
)
def test_every_command_has_help_with_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantfix(monkeypatch, command, "--help") == 0
    assert f"quantfix {command}" in capsys.readouterr().out
