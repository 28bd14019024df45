"""A run whose table of kernels says that floats are slow: what its front obeys and shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from search.pareto.front_json import PRICES
from tests.search.cli.test_main import quantfix, write_config

ROWS = "QLinearConv a,0.1,100000,1000\nQuantizeLinear b,0.1,0,1000\nConv c,9.0,1000,1000\n"
HEAD = "# device: one where floats are slow\nkernel,milliseconds,macs,bytes\n"


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **search: object) -> tuple[int, Path]:
    (folder / "device.csv").write_text(HEAD + ROWS)
    config = write_config(
        folder,
        search={"trials": 8, "max_float_layers": 3} | search,
        latency={"table": "device.csv"},
    )
    return quantfix(monkeypatch, "run", config, "--out", folder / "out", "-q"), folder / "out"


@pytest.mark.slow
def test_the_front_keeps_to_the_limit_and_shows_the_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = run(tmp_path, monkeypatch, trials=16)
    assert code == 0
    front = json.loads((out / "front.json").read_text())
    assert front["limits"]["latency_ratio"] == 1.1
    shown = front["points"] + front["ties"] + front["references"]
    assert all(p["predicted_ms"] > 0 for p in shown)
    assert all(p[name] is not None for p in shown for name in PRICES)
    plain = next(p for p in shown if not p["plan"])
    assert plain["latency_ratio"] == 1
    assert plain["float_macs"] == 0
    slow = [p for p in shown if p["float_macs"]]
    assert slow, "no reference keeps a layer in float"
    assert all(p["latency_ratio"] > 1.1 for p in slow)
    assert all(p["latency_ratio"] <= 1.1 for p in front["points"] + front["ties"])
    # nothing was measured, and nothing was written to the table
    assert (tmp_path / "device.csv").read_text() == HEAD + ROWS


@pytest.mark.slow
def test_time_as_the_cost_of_the_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = run(tmp_path, monkeypatch, cost="latency", max_latency_ratio=0)
    assert code == 0
    front = json.loads((out / "front.json").read_text())
    assert front["cost"] == "latency"
    assert front["limits"]["latency_ratio"] is None
    times = [p["predicted_ms"] for p in front["points"]]
    assert times == sorted(times)


def test_a_table_that_is_not_there_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, latency={"table": "none.csv"})
    assert quantfix(monkeypatch, "run", config, "--out", tmp_path / "out", "-q") == 2
    said = capsys.readouterr().err
    assert "latency.table" in said
    assert "none.csv" in said
