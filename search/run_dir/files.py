"""Files of a run directory: JSON in one piece, lines that are whole or not there, locks that die with us."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from rewriter.storage import replacing

REMEDY = "remove the file and run again: the scores are kept elsewhere"


class RunError(Exception):
    """A run directory cannot be used; the message says why and what to do."""


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON in one piece; a number that is not finite is written as null."""
    with replacing(path) as file:
        json.dump(finite(value), file, indent=1, allow_nan=False)
        file.write("\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the run directory.

    Raises:
        RunError: The file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path}: no such file: is {path.parent} a run directory?") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as cause:
        raise RunError(f"{path}: not JSON: {cause}; {REMEDY}") from cause
    if not isinstance(value, dict):
        raise RunError(f"{path}: not a JSON object: {type(value).__name__}; {REMEDY}")
    return value


def mend(path: Path) -> None:
    """Cut off a last line that a killed process left half written.

    The next appended line would otherwise be glued to it and both would be lost.
    """
    if not path.exists():
        return
    with path.open("r+b") as file, locked(file):
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            block = file.read(end - start)
            newline = block.rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def append(path: Path, text: bytes, *, sync: bool = False) -> None:
    """Append whole lines to a file, or nothing: where the disk is full, no half line is left.

    Args:
        path: Made where it is missing.
        text: Ends with a newline.
        sync: Not to return before it is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("ab", buffering=0) as file, locked(file):
        size = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(text)
            while left:
                left = left[file.write(left) :]
            if sync:
                os.fsync(file.fileno())
        except OSError as cause:
            file.truncate(size)
            raise OSError(cause.errno, cause.strerror, str(path)) from cause


@contextmanager
def locked(file: IO[Any]) -> Generator[None]:
    """Hold the lock of an open file; the kernel releases it when the process dies."""
    fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def finite(value: Any) -> Any:
    """Plain JSON values; a number that is not finite becomes None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        return finite(value.item())
    return value
