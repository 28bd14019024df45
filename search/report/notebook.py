"""How results look in a notebook: what to do, the front as a picture, the tables; and figures on demand."""

from __future__ import annotations

from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

from search import results as stored
from search.report.front import front_figure
from search.report.front_picture import front_picture
from search.report.layers import layers_figure
from search.report.rows import InWords, front_rows, layer_rows, percent
from search.report.verdict import advice
from search.results import Results
from search.sensitivity.run import Sensitivity

LAYERS = 15
# Colors of a notebook's own theme cannot be known: ink is inherited, marks are legible on light and dark.
STYLE = """<style>
.quantfix svg { max-width: 100%; height: auto; } .quantfix svg text { fill: currentColor; font-size: 12px; }
.quantfix .axis { stroke: #8b949e; } .quantfix .front { stroke: #2f81d6; fill: none; stroke-width: 1.5; }
.quantfix .point { fill: #2f81d6; } .quantfix .tie { fill: none; stroke: #2f81d6; stroke-width: 2; }
.quantfix .reference { fill: #d9791a; } .quantfix .other { fill: #8b949e; opacity: .5; }
.quantfix .bar { stroke: #2f81d6; opacity: .6; }
.quantfix .level { stroke: #8b949e; stroke-dasharray: 5 4; }
.quantfix td, .quantfix th { text-align: right; } .quantfix td:first-child { text-align: left; }
</style>"""


class NotebookResults(Results):
    """`search.results.Results` that show themselves in a notebook."""

    def _repr_html_(self) -> str:
        if not self.front.points:
            return _framed(f"<p>{escape(str(self.folder))}: no plan is scored yet.</p>")
        said = f"<p><b>{escape(advice(self))}</b></p>"
        return _framed(f"{said}{front_picture(self)}{_table(*front_rows(self))}")

    def advice(self) -> str:
        """What to ship, in a sentence or two."""
        return advice(self)

    def plot(self) -> Any:
        """The front as an interactive ``plotly.graph_objects.Figure``, as in the report."""
        return front_figure(self)


class NotebookSensitivity(Sensitivity):
    """`search.sensitivity.run.Sensitivity` that shows itself in a notebook."""

    def _repr_html_(self) -> str:
        base = self.baseline
        said = (
            f"{self.metric} float {percent(base.float)}, int8 {percent(base.int8)} on {self.target}; "
            f"{len(self.layers)} layers, each alone in int8, the most harmful first"
        )
        return _framed(f"<p><b>{escape(said)}</b></p>{_table(*layer_rows(self, LAYERS))}")

    def plot(self) -> Any:
        """The most harmful layers as a ``plotly.graph_objects.Figure``, colored by cause."""
        return layers_figure(self)


def load_results(folder: Path) -> NotebookResults:
    """The results in a run directory, for a notebook; arguments and errors as for `search.results.load_results`."""
    return shown(stored.load_results(folder))


def shown(results: Results) -> NotebookResults:
    """The same results, which a notebook can show."""
    values = {f.name: getattr(results, f.name) for f in fields(Results)}
    if results.sensitivity is not None:
        values["sensitivity"] = shown_sensitivity(results.sensitivity)
    return NotebookResults(**values)


def shown_sensitivity(found: Sensitivity) -> NotebookSensitivity:
    """The same analysis, which a notebook can show."""
    return NotebookSensitivity(**{f.name: getattr(found, f.name) for f in fields(Sensitivity)})


def _framed(body: str) -> str:
    return f'<div class="quantfix">{STYLE}{body}</div>'


def _cell(text: str) -> str:
    """A plan in words shows its exact text under the mouse."""
    exact = f' title="{escape(text.exact)}"' if isinstance(text, InWords) else ""
    return f"<td{exact}>{escape(text)}</td>"


def _table(names: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(n)}</th>" for n in names)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
