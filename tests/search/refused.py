"""Runs a command as a user would, and says what it must have answered: exit code 2 and one message."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from search.cli import main as cli

HERE = Path(__file__).parent
Setup = Callable[[Path], Any]
# A run of the small network with its data, but for the search.
SMALL: dict[str, Any] = {
    "task": "classification",
    "model": {"factory": "small:small"},
    "data": {"factory": "small:data"},
    "target": "per_tensor",
    "device": "cpu",
}


@dataclass(frozen=True)
class Bad:
    """One bad input: what the config says instead, the files that are needed, and the answer.

    Attributes:
        name: What is wrong.
        said: Parts of the message, in that order.
        changes: Keys of the config that are replaced.
        setup: Edits the folder of the config.
        words: The command; CONFIG and RUN stand for the config and a run directory.
    """

    name: str
    said: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    setup: Setup = lambda folder: None
    words: tuple[str, ...] = ("check", "CONFIG", "-q")


def model(kind: str, factory: str = "wrong:network") -> dict[str, Any]:
    return {"model": {"factory": factory, "args": {"kind": kind}}}


def splits(kind: str) -> dict[str, Any]:
    return {"data": {"factory": "wrong:splits", "args": {"kind": kind}}}


def write_config(folder: Path, **changes: Any) -> Path:
    """``bad.yaml``, block style as people write it, and the user's code beside it."""
    content = SMALL | {"search": {"trials": 3}} | changes
    for name in ("small.py", "wrong.py"):
        (folder / name).write_text((HERE / name).read_text())
    path = folder / "bad.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def answer(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and all that was printed, on one line."""
    monkeypatch.setattr(sys, "argv", ["quantfix", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, " ".join((printed.out + printed.err).split())


def check(
    bad: Bad, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(folder, **bad.changes)
    bad.setup(folder)
    places = {"CONFIG": str(config), "RUN": str(folder / "run"), "HERE": str(folder)}
    words = [places.get(word, word.replace("HERE/", f"{folder}/")) for word in bad.words]
    assert_refused(bad.said, *answer(words, monkeypatch, capsys))


def assert_refused(said: tuple[str, ...], code: int, text: str) -> None:
    assert "Traceback" not in text
    assert code == 2, text
    end = 0
    for part in said:
        found = text.find(part, end)
        assert found >= 0, f"{part!r} is not in: {text}"
        end = found + len(part)
    # typer's own answers to a misspelt option aside, one message that says whose it is
    assert text.count("quantfix: ") == 1 or "Usage:" in text, text
