"""What a file computes in int8, and what runs in float for what reason, in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rewriter.int8.onnx import FloatLayer, ReadBack
from search.pareto.limits import MOST_REASONS, with_file
from search.report.facts import measured
from search.report.file_facts import file_warnings, told_of_float
from search.report.rows import front_rows, long_form
from search.results import Results, load_results, write_front
from search.run_dir.scores import Records, Score, fingerprint
from tests.search.report.test_report import PARTS, PLANS, make

FILE = ReadBack(
    0.61,
    {"Mul": 3, "Conv": 20},
    (FloatLayer("stem", 90, "its weight is float"), FloatLayer("head", 10, "its weight is float")),
)


def run(folder: Path, found: ReadBack | None, **facts: object) -> Results:
    """A run whose every score is of such a file."""
    make(folder, PLANS, **facts)
    records = Records(folder, fingerprint(PARTS))
    if found is not None:
        lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        for line in lines:
            score = with_file(records.get(line["score"]["plan"]) or Score("", 1), found)
            line["score"] = score.to_dict()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "scores.jsonl").write_text(text)
    return load_results(folder)


def test_too_little_in_int8_is_warned_of_with_the_reason(tmp_path: Path) -> None:
    results = run(tmp_path, FILE)
    plain, best = file_warnings(results)
    assert "the file of plain int8 computes 61.0% of its MACs in int8, less than 95%" in plain
    assert "stem, head: its weight is float; operators in float: Conv 20, Mul 3." in plain
    assert results.best().plan in best
    assert any("61.0% of its MACs" in line for line in measured(results))


@pytest.mark.parametrize(
    ("share", "wanted", "count"), [(0.61, 0.6, 0), (0.96, 0.95, 0), (0.94, 0.95, 2)]
)
def test_the_config_says_how_much_is_enough(
    share: float, wanted: float, count: int, tmp_path: Path
) -> None:
    found = replace(FILE, int8_share=share)
    results = run(tmp_path, found, options={"min_int8_share": wanted})
    assert len(file_warnings(results)) == count


def test_front_json_and_the_table_say_the_share(tmp_path: Path) -> None:
    results = run(tmp_path, FILE)
    write_front(results)
    content = json.loads((tmp_path / "front.json").read_text())
    assert {p["int8_share"] for p in content["points"]} == {0.61}
    assert content["points"][0]["float_ops"] == {"Mul": 3, "Conv": 20}
    names, (row,) = front_rows(results)
    assert row[names.index("in int8")] == "61.0%"
    assert any("in int8 61.0%" in line for line in long_form(results))


def test_scores_of_a_version_that_did_not_look_are_read(tmp_path: Path) -> None:
    results = run(tmp_path, None)
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("int8_share", "float_ops", "float_reasons"):
            line["score"].pop(key)
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = load_results(tmp_path)
    assert [s.plan for s in again.scores] == [s.plan for s in results.scores]
    assert all(s.int8_share is None for s in again.scores)
    assert file_warnings(again) == []
    write_front(again)


def test_a_score_names_the_largest_layers_alone() -> None:
    many = tuple(FloatLayer(f"l{i}", 100 - i, "why") for i in range(50))
    score = with_file(Score("", 1), ReadBack(0.0, {}, many))
    assert list(score.float_reasons or {}) == [f"l{i}" for i in range(MOST_REASONS)]
    again = Score.from_dict(json.loads(json.dumps(score.to_dict())))
    assert again == score
    assert hash(again) == hash(score)  # scores are keys


def test_nothing_in_float_needs_no_words() -> None:
    assert told_of_float({}, {}) == ""
    assert (
        told_of_float({f"l{i}": "why" for i in range(6)}, {}) == "l0, l1, l2, l3 and 2 more: why."
    )
