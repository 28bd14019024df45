"""A function run in a process of its own, which may crash, hang or eat the memory: we go on.

The child is a fork: it has the network, the images and the float outputs without loading anything,
and what it writes to them stays its own. It ends with its parent, whatever ends that one, so that
no lock and no processor is held by an orphan.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import select
import signal
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from tqdm import tqdm

from rewriter.errors import RewriteError

T = TypeVar("T")
HEAD = struct.Struct("<Q")
LOOK_S = 0.5  # between two looks at whether the child is alive
PR_SET_PDEATHSIG = 1


class LostError(RewriteError):
    """A process did not come back with an answer; the message says what became of it."""


class LateError(LostError):
    """A process took longer than it may."""


def possible(device: str) -> bool:
    """Whether a fork of this process can compute: not where CUDA or Apple's frameworks are."""
    return sys.platform == "linux" and device == "cpu" and not torch.cuda.is_available()


def own_locks() -> None:
    """Give this process a lock of its own for progress bars: to be called before a fork.

    tqdm's is shared with forks, and torch.fx takes it for each graph that it interprets: a fork that is killed while it
    holds the lock would stop this process for ever.
    """
    tqdm.set_lock(threading.RLock())


def apart(action: Callable[[], T], limit_s: float) -> T:
    """What a function returns that runs in a child process; what it raises is raised here.

    Args:
        action: Its result must be picklable.
        limit_s: Seconds after which the child is killed.

    Raises:
        LostError: the child took too long, or died.
    """
    own_locks()
    mine, theirs = os.pipe()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child, text, status = 0, None, 0
    try:
        with _interrupted_later():
            with warnings.catch_warnings():
                # Python 3.12 warns of locks that other threads hold; the child takes none of theirs
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:  # which never leaves this block
                os.close(mine)
                _answer(action, theirs, parent)
            os.close(theirs)
        text = _received(mine, child, time.monotonic() + limit_s)
    finally:
        os.close(mine)
        if child:
            status = _ended(child)
    if text is None:
        raise LateError(f"took longer than {limit_s:g} s (search.candidate_timeout)")
    if not text:
        raise LostError(_cause(status))
    worked, value, said = pickle.loads(text)
    for name, level, message in said:
        logging.getLogger(name).log(level, "%s", message)
    if not worked:
        raise value
    return value


@contextmanager
def _interrupted_later() -> Generator[None]:
    """Ctrl-C waits: raised in what Python and its libraries do around a fork, it would be printed and forgotten."""
    if threading.current_thread() is not threading.main_thread():
        yield  # such a thread is never interrupted
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if waiting:
        signal.raise_signal(signal.SIGINT)


def _received(pipe: int, child: int, deadline: float) -> bytes | None:
    """The child's answer; None where it is late, empty where it died."""
    found = bytearray()
    dead = False
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([pipe], [], [], min(left, LOOK_S))
        if not ready and dead:  # a process of its own holds the pipe open
            return b""
        if not ready:
            # left to be waited for: until then no other process gets its number
            dead = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            continue
        block = os.read(pipe, 1 << 20)
        if not block:
            return b""
        found += block
        if len(found) >= HEAD.size and len(found) >= HEAD.size + HEAD.unpack_from(found)[0]:
            return bytes(found[HEAD.size :])
    return None


def _ended(child: int) -> int:
    """Exit status of a child that has answered, is late, or is dead; its own children end too."""
    for end in (os.killpg, os.kill):  # killed in its first moments it has no group yet
        try:
            end(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return os.waitpid(child, 0)[1]


def _cause(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        why = ": out of memory?" if number == signal.SIGKILL else ""
        return f"its process was killed by {signal.Signals(number).name}{why}"
    return f"its process ended with exit code {os.waitstatus_to_exitcode(status)}"


def _answer(action: Callable[[], Any], pipe: int, parent: int) -> NoReturn:
    """In the child: run, write the answer, end."""
    os.setpgid(0, 0)  # so that Ctrl-C reaches the parent alone, which then ends us
    _end_with(parent)
    said = _Said()
    logging.getLogger().handlers[:] = [
        said
    ]  # the parent's may wait for a thread it has and we not
    answer: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            answer.append((True, action()))
        except BaseException as error:
            answer.append((False, _portable(error)))

    # OpenMP's threads are not in the child, but the thread that had them waits for them forever;
    # one that is new starts its own.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    text = pickle.dumps((*answer[0], said.lines))
    data = memoryview(HEAD.pack(len(text)) + text)
    while data:
        data = data[os.write(pipe, data) :]
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: what the parent has registered to be done at its end is not ours to do
    os._exit(0)


def _end_with(parent: int) -> None:
    """The kernel kills us when the parent ends; where memory runs out, it kills us, not the parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _portable(error: BaseException) -> BaseException:
    """The exception with the child's traceback as a note; its text alone where it cannot be sent."""
    text = "".join(traceback.format_exception(error))
    try:
        error.add_note(text)
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    return error


class _Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, record.levelno, record.getMessage()))
