"""The run as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rewriter.storage import replacing
from search.pareto.plan_summary import plan_summary
from search.report.cards import plan_cards, verdict_card
from search.report.facts import commands, measured
from search.report.front_picture import front_picture
from search.report.layers import layers_section
from search.report.losses import losses_section
from search.report.markdown import markdown_report
from search.report.network import network_section
from search.report.outputs import outputs_section
from search.report.page import Section, listed, page, paragraph, table
from search.report.ranges import ranges_section
from search.report.rows import (
    finetuned_rows,
    front_rows,
    in_words,
    ladder,
    ladder_rows,
    ladder_said,
    score_rows,
)
from search.report.snapshot import read_exhibits
from search.results import Results
from search.run_dir.scores import fingerprint

LEGEND = (
    "Point at a plan for its numbers, click for its steps. Bars: 95 % intervals, paired with float on the same samples. Hollow: costs "
    "more, does less damage, and its metric cannot be told from a point's on these samples. Small dots: other plans, as far as they "
    "hide no mark; one that was not run on held-back images is drawn by its drop against float on the others."
)
# Of each picture: on a wide screen or paper, and on a phone.
PICTURES = {"on-wide": (820, 430), "on-narrow": (360, 400)}
TRAINED = "Before and after training; the control is the same training without the rewrites that cost MACs."


def write_report(results: Results) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into the run directory."""
    page_path, text_path = results.folder / "report.html", results.folder / "report.md"
    exhibits = read_exhibits(results.folder, fingerprint(results.facts["parts"]))
    with replacing(page_path) as file:
        file.write(html_report(results, exhibits))
    with replacing(text_path) as file:
        file.write(markdown_report(results))
    return page_path, text_path


def html_report(results: Results, exhibits: Mapping[str, Any] | None = None) -> str:
    """One page: what to do, the front, the layers, the network, how it was measured, how to repeat it.

    Args:
        results: Of the run.
        exhibits: What the network itself was needed for (``search.report.snapshot``); None: these sections are left out.
    """
    title = f"quantfix: {Path(str(results.facts['config'])).stem} on {results.facts['target']}"
    sections = [
        layers_section(results.sensitivity),
        network_section(exhibits, results.sensitivity, results.places),
        ranges_section(exhibits),
        losses_section(exhibits),
        outputs_section(exhibits),
        Section("finetuned", "Fine-tuned", _trained(results)),
        Section(
            "plans", "All plans of the front, remedies and references", _tables(results), True
        ),
        Section("failures", "Plans that could not be scored", _failures(results), True),
        Section("measured", "How it was measured", listed(measured(results)), True),
        Section("repeat", "How to repeat it", _repeat(results)),
    ]
    return page(title, _first_screen(results, exhibits), sections)


def _first_screen(results: Results, exhibits: Mapping[str, Any] | None) -> str:
    if not results.front.points:
        return paragraph("No plan is scored yet.")
    pictures = "".join(
        f'<div class="{name}">{front_picture(results, *size)}</div>'
        for name, size in PICTURES.items()
    )
    return (
        '<div class="first"><section id="verdict" aria-labelledby="verdict-title">'
        f'<h2 id="verdict-title">What to do now</h2>{verdict_card(results)}{_stale(results, exhibits)}</section>'
        '<section id="front" aria-labelledby="front-title"><h2 id="front-title">Front: compute against int8 quality</h2>'
        f'<figure id="front-plot">{pictures}<figcaption>{escape(LEGEND)}</figcaption></figure></section></div>'
        f'<div id="plan-cards">{plan_cards(results)}</div>'
    )


def _tables(results: Results) -> str:
    parts = [table(*front_rows(results))]
    if ladder(results):
        parts.append(f"<h3>{escape(ladder_said(results))}</h3>")
        parts.append(table(*ladder_rows(results)))
    if results.references:
        parts.append("<h3>For comparison: the most harmful layers left in float</h3>")
        parts.append(table(*score_rows(results, results.references)))
    return "".join(parts)


def _trained(results: Results) -> str:
    if not results.finetuned:
        return ""
    return table(*finetuned_rows(results), TRAINED)


def _stale(results: Results, exhibits: Mapping[str, Any] | None) -> str:
    if exhibits is None:
        return paragraph(
            f"Without pictures of the network, which a run makes when it ends: quantfix front {results.folder} --pictures"
        )
    if results.front.points and exhibits["plan"] != results.best().plan:
        earlier = plan_summary(exhibits["plan"], results.places)
        return paragraph(f"Pictures of the network are of an earlier best plan: {earlier}.")
    return ""


def _failures(results: Results) -> str:
    lost = [s for s in results.scores if s.error is not None]
    if not lost:
        return ""
    counted = ", ".join(f"{kind} {n}" for kind, n in results.failures().items())
    rows = [[in_words(results, s.plan), s.error or "", s.traceback or ""] for s in lost]
    said = f"{len(lost)} of {len(results.scores)} plans failed, by kind: {counted}."
    return paragraph(said) + table(["plan", "error", "traceback"], rows)


def _repeat(results: Results) -> str:
    return "<pre><code>" + escape("\n".join(commands(results)), quote=False) + "</code></pre>"
