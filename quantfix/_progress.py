"""How far a run is, on a terminal or in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager

from tqdm import tqdm

from search.cli import console
from search.data.evaluation_set import Tick
from search.job import Progress, silent


def bars(shown: bool | None = None) -> Progress:
    """Progress bars. None: in a notebook and on a terminal, but not in a log."""
    notebook = in_notebook()
    if shown is None:
        shown = notebook or sys.stderr.isatty()
    if not shown:
        return silent
    return _lines if notebook else console.progress(quiet=False)


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, which shows what is written to stderr but is no terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


@contextmanager
def _lines(label: str) -> Generator[Tick]:
    """A bar of characters, which needs no widgets."""
    with tqdm(desc=label, leave=False, file=sys.stderr, ascii=True) as bar:

        def tick(done: int, total: int) -> None:
            bar.total = total
            bar.n = done
            bar.refresh()

        yield tick
