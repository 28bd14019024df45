"""What to say of an exception that the user's own code raised: where, what, and by which lines."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path

import rewriter

OURS = (Path(rewriter.__file__).resolve().parent, Path(__file__).resolve().parent)
INSTALLED = tuple(
    Path(place).resolve()
    for place in {*map(sysconfig.get_path, ("purelib", "platlib", "stdlib")), sys.base_prefix}
)


def blame(error: BaseException, folder: Path | None = None) -> str:
    """Type, place (the last line of the user's own code that it passed) and text.

    Args:
        error: What was raised.
        folder: Where the user's code is; None: wherever nothing is installed.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{Path(error.filename).name}:{error.lineno}"
    else:
        users = [f for f in frames if _is_users(f.filename, folder)]
        frame = (users or list(frames))[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__} at {place}: {text}".rstrip(": ")


def users_lines(error: BaseException) -> str:
    """The lines of the user's own code that an error goes back to, and the last line of all.

    Returns:
        "" where the user's code has no part in it.
    """
    found: BaseException | None = error
    while found is not None:
        frames = list(traceback.extract_tb(found.__traceback__))
        users = [f for f in frames if _is_users(f.filename)]
        if users:
            shown = users if frames[-1] in users else [*users, frames[-1]]
            return "".join([*traceback.format_list(shown), f"{type(found).__name__}: {found}"])
        found = found.__cause__
    return ""


def _is_users(filename: str, folder: Path | None = None) -> bool:
    path = Path(filename)
    if not path.is_file() or path.name == "quantfix":
        return False
    path = path.resolve()
    if any(path.is_relative_to(place) for place in OURS):
        return False
    if folder is not None:
        return path.is_relative_to(folder.resolve())
    return not any(path.is_relative_to(place) for place in INSTALLED)
