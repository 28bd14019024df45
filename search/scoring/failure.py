"""Plans that cannot be scored: whose fault that is, and what is recorded."""

from __future__ import annotations

import errno
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rewriter.errors import RewriteError
from search.run_dir.scores import Score
from search.scoring.measure import Part

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


def failed(known: Score, cause: BaseException, parts: Sequence[Part]) -> list[Score]:
    """A score with the reason for each part."""
    text = " ".join(str(cause).split())[:500]
    kind = "" if isinstance(cause, RewriteError) else f"{type(cause).__name__}: "
    return [
        replace(known, samples=stop - start, error=(kind + text).rstrip(": "))
        for start, stop in parts
    ]


def to_be_tried_again(score: Score, limit_s: float | None) -> bool:
    """Whether a plan was given up after less time than there is now."""
    return score.limit_s is not None and (limit_s is None or limit_s > score.limit_s)
