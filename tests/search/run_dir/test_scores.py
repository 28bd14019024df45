from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewriter.storage.files import replacing
from search.run_dir.files import RunError, append, mend, read_json, write_json
from search.run_dir.scores import Records, Samples, Score, fingerprint, open_run

SCORE = Score(
    plan="keep_float@a", macs=10, metric=0.5, interval=(0.4, 0.6), damage=0.1, engine="x"
)
PARTS = {"model": "1", "calibration": "2", "evaluation": "3", "target": "4", "rules": "5"}


def test_a_score_survives_its_json() -> None:
    assert Score.from_dict(json.loads(json.dumps(SCORE.to_dict()))) == SCORE


def test_a_value_that_is_not_finite_becomes_null_and_keys_of_a_later_version_are_ignored() -> None:
    values = Score(plan="", macs=1, metric=float("nan"), damage=float("inf")).to_dict()
    assert (values["metric"], values["damage"]) == (None, None)
    assert Score.from_dict(values | {"later": 1}).macs == 1


def test_scores_and_samples_are_found_again_by_another_process(tmp_path: Path) -> None:
    samples = Samples(damage=np.arange(5.0), metric=np.ones(5))
    Records(tmp_path, "f").add(SCORE, samples)
    found = Records(tmp_path, "f")
    assert found.get("keep_float@a") == SCORE
    again = found.samples("keep_float@a")
    assert again is not None
    assert again.replicates is None
    assert again.metric is not None
    np.testing.assert_array_equal(again.damage, samples.damage)
    assert found.samples("other") is None


def test_what_another_process_appends_is_seen_after_a_refresh(tmp_path: Path) -> None:
    one, two = Records(tmp_path, "f"), Records(tmp_path, "f")
    two.add(SCORE)
    assert SCORE.plan not in one
    one.refresh()
    assert SCORE.plan in one


def test_a_score_under_another_fingerprint_does_not_count_and_is_not_lost(tmp_path: Path) -> None:
    Records(tmp_path, "old").add(SCORE)
    assert len(Records(tmp_path, "new")) == 0
    assert len(Records(tmp_path, "old")) == 1


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), rubbish=st.binary(max_size=20))
def test_any_half_written_end_costs_at_most_that_line(
    tmp_path: Path, cut: int, rubbish: bytes
) -> None:
    path = tmp_path / "scores.jsonl"
    path.unlink(missing_ok=True)
    records = Records(tmp_path, "f")
    for i in range(3):
        records.add(Score(plan=f"keep_float@n{i}", macs=i))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut] + rubbish.replace(b"\n", b""))
    complete = whole[: len(whole) - cut].count(b"\n")
    again = Records(tmp_path, "f")
    assert complete - 1 <= len(again) <= 3
    again.add(Score(plan="after", macs=1))
    assert "after" in Records(tmp_path, "f")


def test_a_damaged_line_in_the_middle_is_left_out(tmp_path: Path) -> None:
    records = Records(tmp_path, "f")
    records.add(SCORE)
    with records.path.open("a") as file:
        file.write('{"fingerprint": "f", "score": {"macs": \n[1, 2]\n')
    records.add(Score(plan="", macs=1))
    assert [s.plan for s in Records(tmp_path, "f").scores()] == ["keep_float@a", ""]


@pytest.mark.parametrize("size", [0, 10, 70_000])
def test_mend_keeps_whole_lines_only(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one\ntwo\n" + b"x" * size)
    mend(path)
    assert path.read_bytes() == b"one\ntwo\n"
    path.write_bytes(b"x" * size)
    mend(path)
    assert path.read_bytes() == b""


def test_a_full_disk_takes_whole_lines_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, b"a" * 99 + b"\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    try:
        with pytest.raises(OSError, match="lines"):
            append(path, b"b" * 99 + b"\n", sync=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    append(path, b"c\n")
    assert path.read_bytes() == b"a" * 99 + b"\nc\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    write_json(path, {"a": float("nan"), "b": np.float64(2), "c": (1, 2)})
    assert read_json(path) == {"a": None, "b": 2.0, "c": [1, 2]}

    def fail_halfway() -> None:
        with replacing(path) as file:
            file.write("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert read_json(path)["b"] == 2.0
    assert os.listdir(tmp_path) == ["f.json"]


@pytest.mark.parametrize(
    ("content", "said"), [(None, "no such file"), ("{", "not JSON"), ("[1]", "not a JSON object")]
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, content: str | None, said: str
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunError, match=said):
        read_json(path)


def test_a_directory_is_continued_by_the_same_run_only(tmp_path: Path) -> None:
    assert open_run(tmp_path, PARTS, {"config": "a"}) == ()
    assert open_run(tmp_path, PARTS, {"config": "b"}) == ()
    assert read_json(tmp_path / "run.json")["config"] == "b"
    assert open_run(tmp_path, PARTS | {"rules": "6"}, {}) == ("rules",)
    with pytest.raises(RunError, match="another model and target"):
        open_run(tmp_path, PARTS | {"model": "x", "target": "y"}, {})


def test_a_directory_full_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(RunError, match=r"not a run directory: holiday\.jpg"):
        open_run(tmp_path, PARTS, {})


def test_the_fingerprint_depends_on_every_part_and_not_on_their_order() -> None:
    assert fingerprint(PARTS) == fingerprint(dict(reversed(PARTS.items())))
    assert (
        len({fingerprint(PARTS | {name: "other"}) for name in PARTS} | {fingerprint(PARTS)}) == 6
    )


def test_a_score_is_a_key_whatever_it_says_of_its_file() -> None:
    """The schedule remembers the ladder of the scores that it has seen."""
    a, b = (Score(plan="p", macs=1, float_ops={"Add": n}) for n in (1, 2))
    assert a != b
    assert len({a, b}) == 2
