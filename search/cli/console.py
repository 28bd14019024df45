"""What the commands print: text as it is, and progress with the time left."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from search.data.evaluation_set import Tick

BAD_INPUT = 2

MOST_COLUMNS = 100
# tables are no wider, on a wide terminal either; a pipe or a file has no width of its own
out = Console(
    width=min(shutil.get_terminal_size().columns, MOST_COLUMNS)
    if sys.stdout.isatty()
    else MOST_COLUMNS
)
err = Console(stderr=True)


def progress(quiet: bool) -> Any:
    """Progress bars with the time left, on stderr, so that tables can be piped."""
    if quiet:
        from search.job import silent

        return silent

    @contextmanager
    def bars(label: str) -> Generator[Tick]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err) as progress:
            task = progress.add_task(label, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return bars


def refused(message: str, error: Exception | None = None) -> int:
    """Say what is wrong, after the lines of the user's own code that raised it, where it did."""
    lines = ""
    if error is not None:
        from search.data.user_code import users_lines

        lines = users_lines(error)
    if lines:
        say(f"{lines}\n", err)
    say(f"quantfix: {message}", err)
    return BAD_INPUT


def say(text: str, console: Console | None = None) -> None:
    """Print text as it is: a path or a plan must stay on one line and without colors."""
    (console or out).print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
