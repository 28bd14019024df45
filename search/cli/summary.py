"""What a command prints of a run at its end."""

from __future__ import annotations

from search.cli.console import out, say
from search.cli.front_plot import front_plot
from search.cli.tables import (
    MOST_PLANS,
    finetuned_table,
    front_table,
    ladder_table,
    reference_table,
)
from search.job import IN_MEMORY
from search.report.file_facts import file_warnings
from search.report.rows import chosen_few, long_form
from search.report.verdict import advice, luck
from search.results import Results


def show_results(results: Results, quiet: bool, full: bool = False) -> None:
    """The front as a plot and a table, what to do now, and where more is written.

    Args:
        results: Of the run.
        quiet: Nothing.
        full: All that is known of each plan and its exact text, the ladder and the layers in float as well.
    """
    if quiet:
        return
    if full:
        for found in (reference_table(results), ladder_table(results)):
            if found.row_count:
                out.print(found)
    for line in front_plot(results):
        say(line)
    out.print(front_table(results))
    left_out = len(results.front.all()) - len(chosen_few(results, MOST_PLANS))
    if left_out and not full:
        say(f"{left_out} more plans, drawn as dots: --full")
    if full:
        for line in long_form(results):
            say(line)
    if results.finetuned:
        out.print(finetuned_table(results))
    say(advice(results))
    if luck(results):
        say(luck(results))
    for line in file_warnings(results):
        say(line)
    folder = results.folder
    if results.facts["config"] != IN_MEMORY:
        say(f"as a file: quantfix export {folder} --pick best|knee|NUMBER")
    if not full:
        say(f"in full: quantfix front {folder} --full; {folder / 'report.html'}")
    for name in ("front.json", "report.html", "report.md"):
        say(f"written: {folder / name}")
