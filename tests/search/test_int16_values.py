"""A target with 16-bit activations, through the commands; and that the others know nothing of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from rewriter import Plan
from search.config.schema import load_config
from search.export.export import ranges
from search.job import open_job
from search.run import sensitivity_of, space_of
from search.strategy.space import KEEP
from tests.search.cli.test_main import load, quantfix, write_config

LARGE = {"factory": "small:small", "args": {"spread": 20000.0}}


def test_16_bits_at_the_planted_value_are_offered_and_repair_it(tmp_path: Path) -> None:
    cfg = load_config(write_config(tmp_path, target="qnn", model=LARGE))
    job = open_job(cfg, tmp_path / "run")
    assert job.evaluator.engine == "simulate"
    sensitivity = sensitivity_of(job)
    harmful = sensitivity.layers[0]
    assert harmful.node == "pw"  # which reads the value that dw_0 makes
    assert "keep_int16@dw_0" in harmful.answers
    assert harmful.answers[-1].startswith("keep_float@")

    space = space_of(job, sensitivity)
    rules = space.choices["dw_0"]
    assert {"keep_int16", "keep_float"} <= set(rules)  # of which a plan has one
    assert rules[0] == KEEP
    both = space.repair(Plan.parse("keep_int16@dw_0").steps + Plan.parse("keep_float@dw_0").steps)
    assert len(both.steps) == 1

    plain, repaired, elsewhere = (
        job.evaluator(Plan.parse(text)) for text in ("", "keep_int16@dw_0", "keep_int16@pw")
    )
    assert plain.damage is not None
    assert repaired.damage is not None
    assert elsewhere.damage is not None
    assert plain.damage > 0.001
    assert repaired.damage < 0.1 * plain.damage
    assert elsewhere.damage > 0.5 * plain.damage
    assert (repaired.macs, repaired.weight_bytes) == (plain.macs, plain.weight_bytes)
    assert (repaired.float_layers, repaired.float_islands) == (0, 0)  # it is no float layer


@pytest.mark.slow
def test_a_run_on_qnn_scores_such_plans_and_exports_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = {"trials": 22, "max_macs": 3.0, "seed": 0}
    config = write_config(tmp_path, target="qnn", model=LARGE, search=search)
    out = tmp_path / "out"
    assert quantfix(monkeypatch, "run", config, "--out", out, "--quiet") == 0
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    plans = re.findall(r'"plan": "([^"]*keep_int16@[^"]*)"', json.dumps(rows))
    wide = list(dict.fromkeys(plans))
    assert wide
    capsys.readouterr()
    assert quantfix(monkeypatch, "export", out, "--pick", wide[0], "--compare") == 0
    assert "simulation and ONNX Runtime agree on every value" in capsys.readouterr().out
    ranges = load(out / "export" / "ranges.json")
    assert {v.get("bits", 8) for v in ranges["values"].values()} == {8, 16}
    for value in ranges["values"].values():
        # zero is always one of the levels
        levels = (max(value["high"], 0.0) - min(value["low"], 0.0)) / value["scale"]
        assert levels == pytest.approx(65535 if value.get("bits") == 16 else 255, rel=0.01)


@pytest.mark.parametrize("name", ["onnxruntime", "per_tensor", "tflite"])
def test_other_targets_have_no_such_site_answer_or_choice(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, target=name)
    assert quantfix(monkeypatch, "sites", config) == 0
    assert "keep_int16" not in capsys.readouterr().out
    job = open_job(load_config(config), tmp_path / "run")
    sensitivity = sensitivity_of(job)
    assert not [a for layer in sensitivity.layers for a in layer.answers if "int16" in a]
    assert not [r for rules in space_of(job, sensitivity).choices.values() for r in rules if "int16" in r]  # fmt: skip
    refused = job.evaluator(Plan.parse("keep_int16@dw_0"))
    assert refused.error is not None
    assert f"target {name}: no 16-bit activations" in refused.error
    assert np.isfinite(job.evaluator(Plan(())).damage or 0)


def test_a_stored_plan_with_16_bits_comes_back_as_it_was(tmp_path: Path) -> None:
    cfg = load_config(write_config(tmp_path, target="qnn", model=LARGE))
    plan = Plan.parse("keep_int16@dw_0 refine_ranges@model round_weights@model")
    first, again = (
        open_job(cfg, tmp_path / name).evaluator.assembled(plan).quantized for name in ("a", "a")
    )
    for made in (first, again):
        specs = {n.name: n.meta["int8"].output for n in made.gm.graph.nodes}
        assert {name for name, s in specs.items() if s is not None and s.bits == 16} == {"dw_1"}
    assert first.calibration.values == again.calibration.values
    assert ranges(first) == ranges(again)
