"""The table of bad inputs, run directories: damaged, of something else, or in a place that cannot be written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search.cli import main as cli
from search.run_dir import files
from tests.search.refused import Bad, answer, assert_refused, write_config

GONE = object()
EDIT = Callable[[Path], Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a run of it with one plan; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, search={"trials": 1})
    cli.run(config, folder / "run", quiet=True)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    config = write_config(tmp_path, search={"trials": 1})
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts | {"config": str(config)}))
    return tmp_path


def text(name: str, content: str | bytes) -> EDIT:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / "run" / name).write_bytes(raw)


def fact(key: str, value: Any) -> EDIT:
    def edit(folder: Path) -> None:
        path = folder / "run" / "run.json"
        facts = json.loads(path.read_text())
        facts[key] = value
        path.write_text(json.dumps({k: v for k, v in facts.items() if v is not GONE}))

    return edit


def scores(**values: Any) -> EDIT:
    def edit(folder: Path) -> None:
        path = folder / "run" / "scores.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["score"].update(values)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return edit


FRONT, EXPORT, WORKER = (("front", "RUN", "-q"), ("export", "RUN", "-q"), ("worker", "RUN", "-q"))
RUN = ("run", "CONFIG", "-q", "--out", "RUN")
AGAIN = "remove the file and run again: the scores are kept elsewhere"
CASES = [
    *(
        Bad(f"run.json: {name}", (f"run.json: {said}", AGAIN), setup=text("run.json", content), words=words)
        for name, said, content in (
            ("half", "not JSON:", '{"parts": {'),
            ("bytes", "not JSON:", b"\xff\xfe\x00"),
            ("nested", "not JSON:", "[" * 100_000),
            ("a list", "not a JSON object: list", "[1]"),
        )
        for words in (FRONT, RUN)
    ),
    *(
        Bad(f"run.json: {key}: {value!r}", (f"run.json: {said}", AGAIN), setup=fact(key, value), words=FRONT)
        for key, value, said in (
            ("parts", 5, "parts: should be a valid dictionary; is 5"),
            ("parts", {"model": 3}, "parts.model: should be a valid string; is 3"),
            ("baseline", {}, "baseline.float: Field required"),
            ("baseline", {"float": "x"}, "baseline.float: should be a valid number; is 'x'"),
            ("limits", {"macs": "x"}, "limits.macs: should be a valid number; is 'x'"),
            ("objective", "speed", "objective: should be 'metric' or 'damage'; is 'speed'"),
            ("options", 7, "options: should be a valid dictionary; is 7"),
            ("samples", "many", "samples: should be a valid integer; is 'many'"),
            ("selection_samples", 0, "selection_samples: should be greater than or equal to 1; is 0"),
            ("config", 7, "config: should be a valid string; is 7"),
            ("higher_is_better", None, "higher_is_better: should be a valid boolean; is None"),
            ("format", 99, "format 99: written by a later version; this one reads format 1"),
        )
    ),
    *(
        Bad(f"run.json without {key}", (f"no plan is scored yet (run.json has no {key})",),
            setup=fact(key, GONE), words=FRONT)
        for key in ("parts", "baseline", "limits", "config", "metric", "samples")
    ),
    Bad("options of another version", ("search.bogus: unknown key",),
        setup=fact("options", {"bogus": 1}), words=EXPORT),
    Bad("a worker without options", ("no search is running there: start one with quantfix run",),
        setup=fact("options", GONE), words=WORKER),
    Bad("the config is gone", ("nowhere.yaml: cannot be read: No such file",),
        setup=fact("config", "/nowhere.yaml"), words=EXPORT),
    Bad("storage of a worker", ("--storage nonsense://there: cannot be opened: ",),
        setup=fact("storage", "nonsense://user:secret@there"), words=WORKER),
    Bad("records in words", ("no plan is scored yet that can be read: quantfix run",),
        setup=text("scores.jsonl", "garbage\n[]\n5\nnull\n"), words=FRONT),
    Bad("records of other types", ("no plan is scored yet that can be read",),
        setup=scores(macs="many"), words=FRONT),
    Bad("records with three bounds", ("no plan is scored yet that can be read",),
        setup=scores(interval=[1, 2, 3]), words=FRONT),
    Bad("journal in words", ("journal.log: damaged, or no journal of a search:", AGAIN),
        setup=text("journal.log", "garbage\n"), words=RUN),
    Bad("journal in bytes", ("journal.log: damaged, or no journal", AGAIN),
        setup=text("journal.log", b"\xff\x00\xff\n"), words=RUN),
    Bad("journal of another kind", ("journal.log: damaged, or no journal", AGAIN),
        setup=text("journal.log", '{"op_code": 77}\n[]\n'), words=RUN),
    Bad("run of another model", ("holds a run of another model: choose another directory with --out",),
        setup=lambda folder: write_config(
            folder, model={"factory": "small:small", "args": {"seed": 1}}
        ), words=RUN),
    Bad("run of other data", ("holds a run of another calibration and evaluation: choose another directory",),
        setup=lambda folder: write_config(
            folder, data={"factory": "small:data", "args": {"count": 40}}
        ), words=RUN),
    Bad("run for another target", ("holds a run of another target:",),
        setup=lambda folder: write_config(folder, target="tflite"), words=RUN),
    Bad("unknown plan", ("plan 'nope': not among the 1 plans scored",),
        words=("export", "RUN", "--pick", "nope")),
    Bad("a path for a plan", ("plan '../../x@y': not among the 1 plans scored",),
        words=("export", "RUN", "--pick", "../../x@y")),
    Bad("a path in the records", ("plan: rule '../../etc/x': unknown",),
        setup=scores(plan="../../etc/x@y"), words=("export", "RUN", "--pick", "../../etc/x@y")),
    Bad("no directory", ("run.json: no such file: is", "a run directory?"), words=("front", "HERE/none")),
    Bad("a file for a directory", ("no such file: is", "a run directory?"), words=("front", "HERE/bad.yaml")),
    Bad("out is a file", ("small.py: Not a directory",),
        words=("run", "CONFIG", "-q", "--out", "HERE/small.py")),
    Bad("out is no run", ("not empty and not a run directory: bad.yaml",),
        words=("run", "CONFIG", "-q", "--out", "HERE")),
    Bad("out cannot be made", ("/proc/none: No such file or directory",),
        words=("run", "CONFIG", "-q", "--out", "/proc/none/run")),
    Bad("storage", ("--storage sqlite:////proc/none/x.db: cannot be opened: ",),
        words=(*RUN, "--storage", "sqlite:////proc/none/x.db")),
    Bad("drop of 500 points", ("search.max_drop: should be less than or equal to 100; is 500",),
        words=("fix", "CONFIG", "--out", "RUN", "--max-drop", "500")),
    Bad("no compute", ("search.max_macs: should be greater than 0; is 0",),
        words=("fix", "CONFIG", "--out", "RUN", "--max-drop", "1", "--max-macs", "0")),
    Bad("no goal", ("fix: how much may be lost? --max-drop POINTS",),
        words=("fix", "CONFIG", "--out", "RUN")),
    Bad("no time", ("search.timeout: should be greater than 0",), words=(*RUN, "--timeout", "0")),
    Bad("unknown kind", ("init: unknown kind: audio; known: classification, detection, video",),
        words=("init", "audio", "--out", "HERE/new")),
    Bad("a path for a name", ("init: --name: letters, digits and _ only",),
        words=("init", "video", "--out", "HERE/new", "--name", "../x")),
    Bad("files that are there", ("bad.yaml: is there already",),
        words=("init", "video", "--out", "HERE", "--name", "bad")),
]  # fmt: skip


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: f"{bad.name} {bad.words[0]}")
def test_it_is_refused_in_words_and_no_score_is_lost(
    bad: Bad, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad.setup(folder)
    before = (folder / "run" / "scores.jsonl").read_bytes()
    places = {"CONFIG": str(folder / "bad.yaml"), "RUN": str(folder / "run"), "HERE": str(folder)}
    words = [places.get(word, word.replace("HERE/", f"{folder}/")) for word in bad.words]
    code, said = answer(words, monkeypatch, capsys)
    assert_refused(bad.said, code, said)
    assert "secret" not in said
    assert (folder / "run" / "scores.jsonl").read_bytes() == before


def analysis(folder: Path) -> None:
    path = folder / "run" / "sensitivity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": [{"layer": 1}]}))


DAMAGE = [
    ("half an analysis", text("sensitivity.json", '{"layers"'), "make it anew"),
    ("an analysis of words", analysis, "make it anew"),
    ("no samples", lambda f: shutil.rmtree(f / "run" / "samples"), ""),
    ("damaged samples", lambda f: [p.write_bytes(b"") for p in (f / "run/samples").iterdir()], "left out"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "edit", "said"), DAMAGE, ids=lambda x: x if isinstance(x, str) else ""
)
def test_what_can_be_made_again_is_left_out(
    name: str,
    edit: EDIT,
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    edit(folder)
    code, printed = answer(["front", str(folder / "run"), "-q"], monkeypatch, capsys)
    assert (code, "Traceback" in printed) == (0, False), f"{name}: {printed}"
    assert said in caplog.text


def test_a_run_goes_on_after_its_run_json_was_removed_as_the_message_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "run" / "scores.jsonl").read_bytes()
    for name in ("run.json", "journal.log"):
        (folder / "run" / name).unlink()
    words = ["run", str(folder / "bad.yaml"), "-q", "--out", str(folder / "run")]
    assert answer(words, monkeypatch, capsys)[0] == 0
    assert (folder / "run" / "scores.jsonl").read_bytes() == before


def test_a_full_disk_is_said_and_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "run" / "run.json").read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    words = ["run", str(folder / "bad.yaml"), "-q", "--out", str(folder / "run")]
    code, said = answer(words, monkeypatch, capsys)
    assert_refused(("No space left on device",), code, said)
    assert (folder / "run" / "run.json").read_bytes() == before
