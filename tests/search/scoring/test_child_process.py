from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from search.scoring.child_process import LostError, apart, possible

pytestmark = pytest.mark.skipif(
    not possible("cpu"), reason="needs Linux without CUDA, where a fork can compute"
)


def test_what_a_function_returns_and_changes_nothing_here() -> None:
    seen: list[int] = []

    def action() -> int:
        seen.append(1)
        return os.getpid()

    assert apart(action, 30) != os.getpid()
    assert seen == []


def test_torch_computes_on_several_threads_after_it_did_so_here() -> None:
    x = torch.randn(4, 8, 32, 32)
    convolution = torch.nn.Conv2d(8, 8, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        convolution(x).sum().backward()
        assert torch.equal(apart(lambda: convolution(x), 30), convolution(x))
        apart(lambda: convolution(x).sum().backward(), 30)
    finally:
        torch.set_num_threads(threads)


def test_what_it_raises_is_raised_here_with_its_traceback() -> None:
    def broken() -> None:
        raise ZeroDivisionError("in the user's metric")

    with pytest.raises(ZeroDivisionError, match="in the user's metric") as caught:
        apart(broken, 30)
    assert "in broken" in caught.value.__notes__[0]


def test_an_exception_that_cannot_be_sent_keeps_its_text() -> None:
    class LocalError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    def broken() -> None:
        raise LocalError(1, 2)

    with pytest.raises(RuntimeError, match="1 and 2"):
        apart(broken, 30)


def test_a_process_that_hangs_is_given_up_and_ended(tmp_path: Path) -> None:
    def hang() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        while True:
            time.sleep(60)

    with pytest.raises(LostError, match=r"longer than 0\.5 s \(search\.candidate_timeout\)"):
        apart(hang, 0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_process_that_is_killed_or_exits_says_so() -> None:
    with pytest.raises(LostError, match=r"killed by SIGKILL: out of memory\?"):
        apart(lambda: os.kill(os.getpid(), signal.SIGKILL), 30)
    with pytest.raises(LostError, match="killed by SIGTERM"):
        apart(lambda: os.kill(os.getpid(), signal.SIGTERM), 30)
    with pytest.raises(LostError, match="exit code 3"):
        apart(lambda: os._exit(3), 30)


def test_a_grandchild_that_outlives_it_is_not_waited_for() -> None:
    def leave() -> None:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
        os._exit(0)

    with pytest.raises(LostError, match="exit code 0"):
        apart(leave, 30)


def test_a_large_answer_and_what_is_logged_come_back(caplog: pytest.LogCaptureFixture) -> None:
    def action() -> bytes:
        logging.getLogger("search.somewhere").warning("plan %d", 7)
        return bytes(5_000_000)

    with caplog.at_level(logging.WARNING):
        assert len(apart(action, 30)) == 5_000_000
    assert [(r.name, r.getMessage()) for r in caplog.records] == [("search.somewhere", "plan 7")]


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    note = tmp_path / "pid"

    def hang() -> None:
        note.with_suffix(".part").write_text(str(os.getpid()))
        note.with_suffix(".part").rename(note)
        threading.Event().wait()

    parent = os.fork()
    if parent == 0:
        try:
            apart(hang, 600)
        finally:
            os._exit(0)
    for _ in range(1000):
        if note.exists():
            break
        time.sleep(0.01)
    child = int(note.read_text())
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(1000):
        if not _lives(child):
            break
        time.sleep(0.01)
    assert not _lives(child)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_interrupt_around_the_fork_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def interrupted() -> int:
        signal.raise_signal(signal.SIGINT)
        return fork()

    monkeypatch.setattr(os, "fork", interrupted)
    # what a shell starts in the background ignores interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            apart(lambda: 1, 60.0)
    finally:
        signal.signal(signal.SIGINT, before)
