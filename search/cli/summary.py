"""What a command prints of a run at its end."""

from __future__ import annotations

from search.cli.console import out, say
from search.cli.tables import finetuned_table, front_table, ladder_table, reference_table
from search.report.file_facts import file_warnings
from search.results import Results


def show_results(results: Results, quiet: bool) -> None:
    """The front as a table, what to do now, and where more is written."""
    if quiet:
        return
    for found in (reference_table(results), ladder_table(results)):
        if found.row_count:
            out.print(found)
    out.print(front_table(results))
    if results.finetuned:
        out.print(finetuned_table(results))
    say(results.advice())
    if results.luck():
        say(results.luck())
    for line in file_warnings(results):
        say(line)
    for name in ("front.json", "report.html", "report.md"):
        say(f"written: {results.folder / name}")
