"""How results look in a notebook: what to do, the front as a picture, the tables; and figures on demand."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from search.analysis import Sensitivity
    from search.results import Results

LAYERS = 15
# Colours of a notebook's own theme cannot be known: ink is inherited, marks are legible on light and dark.
STYLE = """<style>
.quantfix svg { max-width: 100%; height: auto; } .quantfix svg text { fill: currentColor; font-size: 12px; }
.quantfix .axis { stroke: #8b949e; } .quantfix .front { stroke: #2f81d6; fill: none; stroke-width: 1.5; }
.quantfix .point { fill: #2f81d6; } .quantfix .tie { fill: none; stroke: #2f81d6; stroke-width: 2; }
.quantfix .reference { fill: #d9791a; } .quantfix .other { fill: #8b949e; opacity: .5; }
.quantfix .bar { stroke: #2f81d6; opacity: .6; }
.quantfix .level { stroke: #8b949e; stroke-dasharray: 5 4; }
.quantfix td, .quantfix th { text-align: right; } .quantfix td:first-child { text-align: left; }
</style>"""


class ShownResults:
    """What `search.results.Results` adds for notebooks."""

    def _repr_html_(self) -> str:
        from search.picture import front_svg
        from search.tables import front_rows

        results = cast("Results", self)
        if not results.front.points:
            return _framed(f"<p>{escape(str(results.folder))}: no plan is scored yet.</p>")
        return _framed(
            f"<p><b>{escape(results.advice())}</b></p>{front_svg(results)}{_table(*front_rows(results))}"
        )

    def plot(self) -> Any:
        """The front as an interactive ``plotly.graph_objects.Figure``, as in the report."""
        from search.report.front import front_figure

        return front_figure(cast("Results", self))


class ShownSensitivity:
    """What `search.analysis.Sensitivity` adds for notebooks."""

    def _repr_html_(self) -> str:
        from search.tables import layer_rows, percent

        found = cast("Sensitivity", self)
        base = found.baseline
        said = (
            f"{found.metric} float {percent(base.float)}, int8 {percent(base.int8)} on {found.target}; "
            f"{len(found.layers)} layers, each alone in int8, the most harmful first"
        )
        return _framed(f"<p><b>{escape(said)}</b></p>{_table(*layer_rows(found, LAYERS))}")

    def plot(self) -> Any:
        """The most harmful layers as a ``plotly.graph_objects.Figure``, coloured by cause."""
        from search.report.layers import layers_figure

        return layers_figure(cast("Sensitivity", self))


def _framed(body: str) -> str:
    return f'<div class="quantfix">{STYLE}{body}</div>'


def _table(names: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(n)}</th>" for n in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
