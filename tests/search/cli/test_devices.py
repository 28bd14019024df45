from __future__ import annotations

from pathlib import Path

import pytest

from search.latency.table import about_of, read_table, this_machine
from tests.search.cli.test_main import quantfix, write_config


def test_tables_are_listed_and_the_kernels_of_a_network_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUANTFIX_CACHE", str(tmp_path / "cache"))
    assert quantfix(monkeypatch, "devices") == 0
    assert "this machine has none yet" in capsys.readouterr().out.replace("\n", " ")
    config, out = write_config(tmp_path), tmp_path / "kernels.csv"
    assert quantfix(monkeypatch, "devices", config, "--out", out) == 0
    assert "ms on one thread" in capsys.readouterr().out.replace("\n", " ")
    found = dict(read_table(out))
    assert found == {n: e for n, e in read_table(this_machine().path) if n in found}
    assert any(name.startswith("QLinearConv") for name in found)
    assert about_of(out)["network"].startswith("small.yaml")
    assert quantfix(monkeypatch, "devices") == 0
    assert "this machine" in capsys.readouterr().out.replace("\n", " ")
    # and the file is a table that a config can name
    priced = write_config(tmp_path, latency={"table": "kernels.csv"})
    assert quantfix(monkeypatch, "devices", priced) == 0
    assert "kernels.csv" in capsys.readouterr().out.replace("\n", " ")
