"""The run as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rewriter.storage import replacing
from search.report.facts import commands, measured
from search.report.front import effect_rows, front_figure
from search.report.layers import layers_section
from search.report.markdown import markdown_report
from search.report.network import network_section
from search.report.outputs import outputs_section
from search.report.page import Section, listed, page, paragraph, plot, table
from search.report.ranges import ranges_section
from search.report.rows import (
    finetuned_rows,
    front_rows,
    ladder,
    ladder_rows,
    ladder_said,
    score_rows,
)
from search.report.snapshot import read_exhibits
from search.report.verdict import advice
from search.results import Results
from search.run_dir.scores import fingerprint

LEGEND = (
    "Point at a plan for its steps and numbers. Filled: on the front; hollow: costs more, does less damage, and its "
    "metric cannot be told from a point's on these samples. Bars: 95 % intervals, paired with float on the same "
    "samples. Free remedies and layers in float stand a little beside their cost, so as not to hide the others. "
    "Plans far below plain int8 lie outside; zoom out to see them. Where images are held back, plans that were not "
    "run on these are drawn by their drop against float on the others."
)
EFFECTS = "Each row compares two plans that were scored, of which one has this step more; several rows need not add up."

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
    from plotly.offline import get_plotlyjs

    title = f"quantfix: {Path(str(results.facts['config'])).stem} on {results.facts['target']}"
    sections = [
        Section("front", "Front: compute against int8 quality", _front(results)),
        Section("finetuned", "Fine-tuned", _trained(results)),
        layers_section(results.sensitivity),
        network_section(exhibits, results.sensitivity),
        ranges_section(exhibits),
        outputs_section(exhibits),
        Section("failures", "Plans that could not be scored", _failures(results)),
        Section("measured", "How it was measured", listed(measured(results))),
        Section("repeat", "How to repeat it", _repeat(results)),
    ]
    lead = f'<p class="advice">{escape(advice(results))}</p>' + _stale(results, exhibits)
    return page(title, lead, sections, get_plotlyjs())


def _front(results: Results) -> str:
    count = len(results.front.points)
    said = f"{count} plans on the front of {len(results.scores)} scored; the table below has their numbers"
    parts = [
        plot("front-plot", front_figure(results).to_json(), said, LEGEND),
        table(*front_rows(results)),
    ]
    best = results.best() if results.front.points else None
    if best is not None and best.plan:
        parts.append("<h3>What each step of the best plan costs and gains</h3>")
        parts.append(table(*effect_rows(results, best), EFFECTS))
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
        return paragraph(
            f'Pictures of the network are of an earlier best plan: "{exhibits["plan"]}".'
        )
    return ""


def _failures(results: Results) -> str:
    lost = [s for s in results.scores if s.error is not None]
    if not lost:
        return ""
    counted = ", ".join(f"{kind} {n}" for kind, n in results.failures().items())
    rows = [[s.plan, s.error or "", s.traceback or ""] for s in lost]
    said = f"{len(lost)} of {len(results.scores)} plans failed, by kind: {counted}."
    return paragraph(said) + table(["plan", "error", "traceback"], rows)


def _repeat(results: Results) -> str:
    return "<pre><code>" + escape("\n".join(commands(results)), quote=False) + "</code></pre>"
