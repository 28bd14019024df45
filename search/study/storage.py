"""Where a study is kept, and who is at work on it: locks that a killed process cannot leave."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from search.run_dir.files import REMEDY, RunError, append, mend
from search.study.queue import enqueued_choices, give_back, is_users

log = logging.getLogger(__name__)


def journal(path: Path) -> JournalStorage:
    """Optuna storage in one file, locked so that a killed process leaves no lock behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mend(path)
    try:
        if path.exists():  # Optuna would notice a line that is none only when it appends another
            with path.open("rb") as file:
                for line in file:
                    json.loads(line)
        return JournalStorage(_Journal(path))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as damage:
        fact = f"damaged, or no journal of a search: {damage}"
        raise RunError(f"{path}: {fact}; {REMEDY}") from damage


def storage_at(place: str) -> BaseStorage:
    """Optuna storage of a database URL, or of a journal file.

    Raises:
        RunError: the database cannot be opened.
    """
    if "://" not in place:
        return journal(Path(place))
    scheme, _, rest = place.partition("://")
    # "postgresql" alone is another driver in each version of SQLAlchemy
    driver = "postgresql+psycopg" if scheme in ("postgres", "postgresql") else scheme
    shown = f"{scheme}://{rest.rpartition('@')[2]}"  # without a password
    try:
        return get_storage(f"{driver}://{rest}")
    except ImportError as cause:
        raise RunError(
            f"--storage {shown}: {cause.name or cause} is not installed: "
            "pip install 'quantfix[postgres]'"
        ) from cause
    except (ValueError, SQLAlchemyError, OptunaError) as cause:
        said = str(cause.__cause__ or cause).strip().splitlines() or [type(cause).__name__]
        secret = rest.rpartition("@")[0]
        reason = said[0].replace(secret, "***") if secret else said[0]
        raise RunError(f"--storage {shown}: cannot be opened: {reason}") from cause


@contextmanager
def working(folder: Path) -> Generator[str]:
    """Name of this worker; the lock on a file of that name falls when it dies."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with path.open("w") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        try:
            yield path.name
        finally:
            path.unlink(missing_ok=True)


def workers(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def is_held(path: Path) -> bool:
    try:
        with path.open("r") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def recover(study: optuna.Study, folder: Path, me: str, elsewhere_s: float | None = None) -> None:
    """End the trials of dead workers, and, where nobody else is at work, the queue they left.

    Their plans are proposed again, in the order of an undisturbed run. What a user has enqueued
    stays in the queue, or comes back to it.

    Args:
        study: In a storage that all its workers share.
        folder: Locks of the workers of this run directory.
        me: Name of this worker.
        elsewhere_s: Seconds after which a trial of a worker that has no lock here is one of a dead
            worker; None: at once.
    """

    def waiting() -> list[FrozenTrial]:
        return study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    known = workers(folder)
    living = {name for name in known if name == me or is_held(folder / name)}
    elsewhere = False
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.user_attrs.get("worker")
        if owner in living:
            continue
        if elsewhere_s is not None and owner not in known:
            began = trial.datetime_start
            if began is None or (datetime.now() - began).total_seconds() < elsewhere_s:
                elsewhere = True
                continue
        log.info("trial %d of a worker that is gone: to be tried again", trial.number)
        give_back(study, trial.number)
    for name in known - living:
        (folder / name).unlink(missing_ok=True)
    if living <= {me} and not elsewhere:
        while not all(map(is_users, queue := waiting())):
            if is_users(queue[0]):  # to the end of the queue
                study.enqueue_trial(enqueued_choices(queue[0]))
            study.tell(study.ask(), state=TrialState.FAIL)


class _FileLock(JournalFileOpenLock):
    """The kernel's lock on a file beside the journal: unlike a lock file it dies with us."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path.with_name(path.name + ".lock")
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        self._file = self._path.open("w")
        fcntl.flock(self._file.fileno(), fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _Journal(JournalFileBackend):
    """Optuna's journal without a wait for the disk after each of some forty lines per trial.

    A killed process loses nothing by that. A power cut may lose the last lines; their scores are
    on disk all the same (`Records` does wait), and the search finds them there.
    """

    def __init__(self, path: Path) -> None:
        self._lines, self._guard = path, _FileLock(path)
        super().__init__(str(path), lock_obj=self._guard)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in logs)
        self._guard.acquire()
        try:
            append(self._lines, text.encode())
        finally:
            self._guard.release()
