"""Plans that cannot be scored: whose fault that is, and what is recorded."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rewriter.errors import RewriteError
from rewriter.storage import short
from search.run_dir.scores import Score
from search.scoring.measure import Part

FOLDER = "failures"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CandidateError(Exception):
    """Marks an exception that a candidate raised, and not the user's data."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@contextmanager
def blamed() -> Generator[None]:
    """What goes wrong inside is the candidate's fault; a full disk is not."""
    try:
        yield
    except Exception as cause:
        if isinstance(cause, OSError) and cause.errno in FULL:
            raise
        raise CandidateError(cause) from cause


def failed(
    known: Score, cause: BaseException, parts: Sequence[Part], folder: Path | None
) -> list[Score]:
    """A score with the reason for each part; the traceback is kept in the run directory."""
    where = None if folder is None else keep_traceback(folder, known.plan, cause)
    text = " ".join(str(cause).split())[:500]
    kind = "" if isinstance(cause, RewriteError) else f"{type(cause).__name__}: "
    return [
        replace(
            known,
            samples=stop - start,
            error=(kind + text).rstrip(": "),
            error_kind=type(cause).__name__,
            traceback=where,
        )
        for start, stop in parts
    ]


def keep_traceback(folder: Path, plan: str, cause: BaseException) -> str:
    """Write where a plan failed to a file of its own; return its path inside the run directory."""
    name = f"{FOLDER}/{short(plan)[:16]}.txt"
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    text = "".join(traceback.format_exception(cause))
    (folder / name).write_text(f"plan: {plan or '(the network as it is)'}\n\n{text}")
    return name


def to_be_tried_again(score: Score, limit_s: float | None) -> bool:
    """Whether a plan was given up after less time than there is now."""
    return score.limit_s is not None and (limit_s is None or limit_s > score.limit_s)
