"""Whatever is written in a config, a plan or a file of a run directory, the answer is one of our errors."""

# ruff: noqa: PT017 - most inputs raise, and one that does not is right as well

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewriter import RULES, Plan, PlanError
from rewriter.sensitivity.journal import Journal
from search.config.schema import Config, ConfigError, load_config
from search.report.verdict import advice
from search.results import load_results
from search.run_dir.files import RunError
from search.run_dir.scores import Records, Score, fingerprint
from search.sensitivity.run import read_sensitivity
from search.study.storage import journal

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PARTS = {"model": "1", "rules": "2"}
SCORE = Score(plan="", macs=10, metric=0.5, interval=(0.4, 0.6), damage=0.1, samples=4).to_dict()
RUN = {
    "config": "a.yaml",
    "metric": "top1",
    "higher_is_better": True,
    "target": "tflite",
    "engine": "simulate",
    "samples": 4,
    "parts": PARTS,
    "places": {"a": ["net.a", "conv"]},
    "baseline": {"float": 0.6, "int8": 0.5, "macs": 10, "damage": 0.1, "interval": [0.4, 0.6]},
    "objective": "metric",
    "limits": {"macs": 12.0},
}
CONFIG = {
    "task": "classification",
    "model": {"factory": "a:b", "args": {"x": 1}},
    "data": {"npz": "x.npz", "mean": [0.5], "std": [1.0], "size": 8},
    "search": {"trials": 3, "max_macs": 1.1},
}
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["metric", "npz", "a:b", "1e999", "2020-99-99", "../../x", "\0", "cuda:1"])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, good: dict[str, Any]) -> Any:
    """A right value with one place of it, at any depth, replaced, left out or added to."""
    whole = json.loads(json.dumps(good))
    at: Any = whole
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = draw(st.sampled_from(keys))
        if isinstance(at[key], (dict, list)) and at[key] and draw(st.booleans()):
            at = at[key]
            continue
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "replace":
            at[key] = draw(values)
        elif kind == "remove":
            del at[key]
        elif isinstance(at, dict):
            at[draw(st.text(max_size=6))] = draw(values)
        else:
            at.append(draw(values))
        return whole


def cut(text: bytes) -> st.SearchStrategy[bytes]:
    """The bytes of a right file with some of them lost, doubled or flipped."""
    place = st.integers(0, len(text))
    return st.builds(lambda a, b, c: text[:a] + c + text[b:], place, place, st.binary(max_size=6))


@FUZZ
@given(
    st.text() | values.map(lambda v: yaml.safe_dump(v, allow_unicode=True))
    | changed(CONFIG).map(lambda v: yaml.safe_dump(v, allow_unicode=True))
)  # fmt: skip
def test_a_config_is_read_or_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(file)
    except ConfigError as error:
        assert str(error).startswith(("a.yaml", str(file)))
    else:
        assert isinstance(config, Config)


@FUZZ
@given(cut(yaml.safe_dump(CONFIG).encode()) | st.binary(max_size=60))
def test_bytes_are_read_or_refused(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(raw)
    try:
        assert load_config(file).path == file
    except ConfigError as error:
        assert str(error)


words = st.text(max_size=6) | st.sampled_from(
    [f"{rule.name}@a_{i}" for i, rule in enumerate(RULES)]
)


@FUZZ
@given(st.text() | st.lists(words, max_size=4).map(" ".join))
def test_the_text_of_a_plan_is_read_or_refused(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except PlanError as error:
        assert str(error).startswith("plan: ")
    else:
        assert Plan.parse(str(plan)) == plan
        assert sorted(set(text.split())) == sorted(str(plan).split())


def write_run(folder: Path, run: bytes, scores: bytes) -> None:
    (folder / "run.json").write_bytes(run)
    (folder / "scores.jsonl").write_bytes(scores)


def line(score: Any) -> bytes:
    return json.dumps({"fingerprint": fingerprint(PARTS), "score": score}).encode() + b"\n"


def assert_results_or_refusal(folder: Path) -> None:
    try:
        results = load_results(folder)
    except RunError as error:
        assert str(folder) in str(error)
        return
    assert results.front_dict()["format"] == 1
    assert advice(results)


@FUZZ
@given(changed(RUN).map(lambda v: json.dumps(v).encode()) | cut(json.dumps(RUN).encode()))
def test_a_run_json_is_read_or_refused(tmp_path: Path, raw: bytes) -> None:
    write_run(tmp_path, raw, line(SCORE))
    assert_results_or_refusal(tmp_path)


@FUZZ
@given(changed(SCORE).map(line) | values.map(line) | cut(line(SCORE)))
def test_a_record_is_read_or_left_out(tmp_path: Path, raw: bytes) -> None:
    other = Score(plan="keep_float@a", macs=12, metric=0.6, damage=0.05, samples=4).to_dict()
    write_run(tmp_path, json.dumps(RUN).encode(), raw + b"\n" + line(other))
    records = Records(tmp_path, fingerprint(PARTS))
    assert "keep_float@a" in records or not raw.endswith(b"\n")
    assert_results_or_refusal(tmp_path)


@FUZZ
@given(changed({"layers": [{"layer": "a", "node": "a", "kind": "conv", "macs": 4, "damage": 0.1}],
                "target": "t", "metric": "m", "higher_is_better": True, "samples": 4, "engine": "e",
                "baseline": RUN["baseline"]}) | values)  # fmt: skip
def test_an_analysis_is_read_or_left_out(tmp_path: Path, value: Any) -> None:
    (tmp_path / "sensitivity.json").write_text(json.dumps(value))
    found = read_sensitivity(tmp_path)
    assert found is None or all(
        isinstance(d, float | int) for d in found.damage_by_node().values()
    )


@FUZZ
@given(st.binary(max_size=50) | st.lists(values, max_size=3).map(
    lambda rows: b"".join(json.dumps(r).encode() + b"\n" for r in rows)))  # fmt: skip
def test_a_journal_is_read_or_started_anew(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "a.jsonl"
    header = json.dumps({"format": 1, "fingerprint": "f"}).encode() + b"\n"
    good = json.dumps({"key": "a", "value": 1}).encode() + b"\n"
    file.write_bytes(header + good + raw)
    with Journal(file, "f") as known:
        assert known["a"] == 1 or "a" in known
        known.add("b", 2)
    with Journal(file, "f") as again:
        assert again["b"] == 2


@settings(FUZZ, max_examples=60)
@given(values.map(lambda v: json.dumps(v).encode() + b"\n") | st.binary(min_size=1, max_size=30))
def test_the_searchs_journal_is_read_or_refused(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "journal.log"
    file.write_bytes(raw)
    try:
        journal(file).get_all_studies()
    except RunError as error:
        assert "the scores are kept elsewhere" in str(error)


@pytest.mark.parametrize("name", ["run.json", "sensitivity.json"])
def test_what_is_nested_beyond_reason_is_no_crash(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, json.dumps(RUN).encode(), line(SCORE))
    (tmp_path / name).write_text("[" * 100_000)
    assert_results_or_refusal(tmp_path)
