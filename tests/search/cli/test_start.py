"""Help and misspelt options are answered at once: without torch, which takes seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from search.cli.main import app

HEAVY = ("torch", "onnx", "onnxruntime", "optuna", "timm", "sklearn", "search.job")
COMMANDS = sorted(str(c.name or c.callback.__name__) for c in app.registered_commands)  # type: ignore[union-attr]


def answered(*words: str) -> tuple[int, str, list[str]]:
    """Exit code, all that was printed, and the heavy packages that were imported."""
    start = (
        "import sys, json, io, contextlib; "
        f"sys.argv = ['quantfix', *{list(words)!r}]\n"
        "from search.cli.main import main\n"
        "said, code = io.StringIO(), None\n"
        "try:\n"
        "    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said): main()\n"
        "except SystemExit as stop: code = stop.code\n"
        f"print(json.dumps([code, said.getvalue(), [n for n in {HEAVY!r} if n in sys.modules]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, check=True
    )
    code, said, heavy = json.loads(done.stdout.splitlines()[-1])
    return code, said, heavy


def test_help_needs_no_torch() -> None:
    code, said, heavy = answered("--help")
    assert code == 0 and all(name in said for name in COMMANDS)
    assert heavy == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_needs_no_torch_and_shows_an_example(command: str) -> None:
    code, said, heavy = answered(command, "--help")
    assert code == 0 and f"Example: quantfix {command}" in said
    assert heavy == []


@pytest.mark.parametrize(
    "words",
    [("run",), ("run", "a.yaml", "--speed", "3"), ("walk",), ("fix", "a.yaml", "--max-macs", "x")],
)
def test_wrong_arguments_are_refused_without_torch(words: tuple[str, ...]) -> None:
    code, said, heavy = answered(*words)
    assert code == 2 and "Usage" in said
    assert heavy == []


@pytest.mark.slow
def test_the_check_sees_torch_where_a_command_is_carried_out() -> None:
    code, said, heavy = answered("front", "no such folder")
    assert code == 2 and "no such file" in said
    assert "torch" in heavy
