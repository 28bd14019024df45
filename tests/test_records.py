"""What README, docs and configs say of the embedded examples is what the records of their runs say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import records
from benchmarks.tables import DOCUMENTS, filled
from benchmarks.tables import figures as figures_of_record
from rewriter import Plan
from search.config.schema import load_config
from search.data import digits
from search.job import open_job

ROOT = Path(__file__).resolve().parents[1]
RECORDS = sorted((ROOT / "results").glob("digits*/*.json"))
# Documents all of whose percentages come from records.
QUOTING = ("docs/reference.md",)
EXAMPLES = {"digits", "digits_detection", "digits_video"}
# A text that quotes a record, the record, and which of its figures the text has to name.
QUOTED = [
    ("README.md", "digits/per_tensor", ("float", "int8")),
    ("configs/digits.yaml", "digits/per_tensor", ("float", "int8")),
    ("docs/detector.md", "digits_detection/onnxruntime", ("float", "int8", "best", "interval")),
    ("docs/video.md", "digits_video/per_tensor", ("float", "int8", "best")),
]


def test_every_record_has_what_a_reader_needs() -> None:
    found = records()
    assert {f"{name}/per_tensor" for name in ("digits", "digits_video")} <= set(found)
    for name, known in found.items():
        assert name == f"{known.network}/{known.target}"
        assert known.what and known.data and known.command and known.versions
        best = known.chosen
        assert best is None or best.plan in {p["plan"] for p in known.points} | {""}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_tables_of_documents_are_those_of_the_records(path: Path) -> None:
    text = path.read_text()
    assert filled(text) == text, "python -m benchmarks.tables"


def unrecorded(text: str) -> list[str]:
    """Percentages of a text that no record holds, rounded as the text rounds them."""
    known = [v for r in records().values() for v in figures_of_record(r)]
    return [
        quoted
        for quoted in sorted(percentages(text))
        if "." in quoted
        and not any(f"{v:.{len(quoted.partition('.')[2])}f}" == quoted for v in known)
    ]


@pytest.mark.parametrize("path", QUOTING)
def test_a_document_quotes_no_figure_that_no_record_holds(path: str) -> None:
    assert unrecorded((ROOT / path).read_text()) == []


def test_a_figure_without_a_record_is_noticed() -> None:
    assert unrecorded("falls to 88.78 %, and with the rewrite 12.34 %") == ["12.34"]


def record(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def figures(found: dict[str, Any]) -> dict[str, float]:
    """The figures of a record that a text may quote, in percent."""
    best = max(found["points"], key=lambda p: (p["int8"], -p["damage"]))
    low, high = best["int8_interval"]
    wanted = {**found["baseline"], "best": best["int8"], "low": low, "high": high}
    return {k: 100 * wanted[k] for k in ("float", "int8", "best", "low", "high")}


def percentages(text: str) -> set[str]:
    """Every "12.3 %" of a text, and both ends of every "[12.3, 45.6]", as they are written."""
    ends = {e for pair in re.findall(r"\[([\d.]+), ([\d.]+)\]", text) for e in pair}
    return set(re.findall(r"([\d.]+) ?%", text)) | ends


def says(text: str, value: float) -> bool:
    """Whether a text has this figure, rounded to as many places as the text gives it."""
    return any(f"{value:.{len(p.partition('.')[2])}f}" == p for p in percentages(text) if "." in p)


def test_there_is_one_record_for_each_example() -> None:
    assert {json.loads(file.read_text())["network"] for file in RECORDS} == EXAMPLES
    assert {file.stem for file in digits.WEIGHTS.glob("*.json")} == EXAMPLES


@pytest.mark.parametrize("file", RECORDS, ids=lambda f: f.parent.name)
def test_a_record_is_of_a_config_that_is_shipped(file: Path) -> None:
    found = json.loads(file.read_text())
    cfg = load_config(ROOT / found["command"].split()[-1])
    assert cfg.target == found["target"] == file.stem
    trained = json.loads((digits.WEIGHTS / f"{found['network']}.json").read_text())
    assert (ROOT / found["weights"]).is_file()
    assert trained["float"] == pytest.approx(found["baseline"]["float"], abs=1e-4)


@pytest.mark.parametrize(("path", "name", "quoted"), QUOTED, ids=[q[0] for q in QUOTED])
def test_a_text_quotes_the_record(path: str, name: str, quoted: tuple[str, ...]) -> None:
    text, known = (ROOT / path).read_text(), figures(record(name))
    wanted = [k for q in quoted for k in (("low", "high") if q == "interval" else (q,))]
    missing = {k: round(known[k], 2) for k in wanted if not says(text, known[k])}
    assert not missing, f"{path} does not say {missing}"


def test_a_wrong_figure_is_noticed() -> None:
    assert says("falls from 99.1 % to 88.78 %", 88.777)
    assert says("AP 76.04 % [75.69, 76.45]", 76.447)
    assert not says("falls from 99.1 % to 87.8 %", 88.777)
    assert not says("88.78 of them", 88.777)


@pytest.mark.slow
@pytest.mark.parametrize("file", RECORDS, ids=lambda f: f.parent.name)
def test_a_run_measures_what_the_record_says(file: Path, tmp_path: Path) -> None:
    """Other processors round otherwise, by an image or two; a claim of points has to hold."""
    found = json.loads(file.read_text())
    job = open_job(load_config(ROOT / found["command"].split()[-1]), tmp_path, threads=1)
    plain = job.evaluator.score(Plan(), "whole")
    baseline = job.evaluator.baseline()
    assert plain.error is None
    assert baseline.float == pytest.approx(found["baseline"]["float"], abs=0.003)
    assert baseline.int8 == pytest.approx(found["baseline"]["int8"], abs=0.01)
