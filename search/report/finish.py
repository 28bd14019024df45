"""What is on disk when a run ends, however it ends: the front, and the report with its pictures."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from search.job import Job, Progress
from search.report import write_report
from search.report.sensitivity_svg import write_sensitivity_svg
from search.report.snapshot import write_exhibits
from search.results import load_results, write_front
from search.run import note_ladder, sensitivity_of


@contextmanager
def reported(job: Job, bars: Progress) -> Generator[None]:
    """Report what is scored after the body; also where Ctrl-C or an error ends it, which then goes on.

    Pictures take seconds: they are made after Ctrl-C too, and left out at a second one or after an error.
    """
    try:
        yield
        draw(job, bars)
    except KeyboardInterrupt:
        job.records.refresh()
        if len(job.records):
            draw(job, bars, "drawing what is there; Ctrl-C again leaves it out")
        raise
    finally:
        job.records.refresh()
        if len(job.records):
            results = load_results(job.folder)
            write_front(results)
            write_report(results)


def draw(job: Job, bars: Progress, label: str = "drawing the network") -> None:
    """Write what the report shows of the network and of the ladder of remedies."""
    note_ladder(job, sensitivity_of(job))
    write_sensitivity_svg(job.folder)
    with bars(label) as tick:
        write_exhibits(job, load_results(job.folder), tick)
