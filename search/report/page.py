"""The frame of the HTML report: style, script, tables, figures, sections with an index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #57606a;
  --line: #d0d7de; --panel: #f6f8fa; --mark: #0b6bcb; --ref: #b35900; --new: #1a7f37;
  --gone: #b3261e; --box: #e9edf1; --newbox: #d7f5df; --gonebox: #ffe1de; --floatbox: #fdeccf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9aa4ae;
  --line: #30363d; --panel: #161b22; --mark: #58a6ff; --ref: #f0a35e; --new: #56d364;
  --gone: #ff8a80; --box: #21262d; --newbox: #12351f; --gonebox: #45191a; --floatbox: #41300f; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.55rem; margin-bottom: .4rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; overflow-wrap: anywhere; }
a { color: var(--mark); } nav a { margin-right: 1rem; display: inline-block; }
.advice { font-size: 1.1rem; border-left: 4px solid var(--mark); background: var(--panel);
  padding: .7rem 1rem; margin: 1rem 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .88rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { text-align: right; padding: .28rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 11rem; }
td.text, th.text { text-align: left; }
.wide { overflow-x: auto; } .soft { color: var(--soft); } .small { font-size: .88rem; }
figure { margin: .6rem 0 1rem; } figcaption { color: var(--soft); font-size: .88rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--mark); }
svg { max-width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font-size: 12px; }
svg .quiet { fill: var(--soft); } .axis { stroke: var(--line); } .plotly text { fill: inherit; }
.plot { width: 100%; } .plot svg { max-width: none; display: initial; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; }
.side figure { margin: 0; } .side h4 { margin: 0 0 .2rem; font-size: .9rem; }
code, pre { font: .88rem/1.5 ui-monospace, monospace; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.skip { position: absolute; left: -100rem; } .skip:focus { left: 1rem; }
@page { margin: 14mm; }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --soft: #444; --line: #bbb;
  --panel: #f4f4f4; --mark: #0b4f9c; --ref: #8a4500; --new: #1a7f37; --gone: #b3261e;
  --box: #e9edf1; --newbox: #d7f5df; --gonebox: #ffe1de; --floatbox: #fdeccf; }
  body { margin: 0; max-width: none; font-size: 11pt; } nav, .skip, .modebar { display: none; }
  figure, tr, .advice { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .wide { overflow: visible; } table { font-size: 8pt; }
  th, td { padding: .2rem .35rem; } th:first-child, td:first-child { min-width: 7rem; } * { print-color-adjust: exact; } }
"""

# Plotly writes its colors into the figure, so they are set again when the theme or the medium changes.
SCRIPT = """
(() => {
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const plots = [];
  const theme = print => {
    const light = {'--ink': '#000', '--paper': '#fff', '--line': '#bbb', '--soft': '#444'};
    const of = name => print ? light[name] : color(name);
    for (const plot of plots) {
      const ink = of('--ink'), line = of('--line'), paper = of('--paper'), change = {
        'font.color': ink, 'paper_bgcolor': paper, 'plot_bgcolor': paper,
        'legend.bgcolor': paper, 'hoverlabel.bgcolor': paper, 'hoverlabel.font.color': ink,
        'hoverlabel.bordercolor': of('--soft')};
      for (const axis of ['xaxis', 'yaxis'])
        for (const part of ['gridcolor', 'linecolor', 'zerolinecolor', 'tickcolor'])
          change[axis + '.' + part] = line;
      Plotly.relayout(plot, change);
    }
  };
  for (const source of document.querySelectorAll('script[type="application/json"][data-plot]')) {
    const plot = document.getElementById(source.dataset.plot);
    const {data, layout} = JSON.parse(source.textContent);
    Plotly.newPlot(plot, data, layout,
      {responsive: true, displaylogo: false, modeBarButtonsToRemove: ['lasso2d', 'select2d']});
    plots.push(plot);
  }
  theme(false);
  dark.addEventListener('change', () => theme(false));
  addEventListener('beforeprint', () => {
    for (const part of document.querySelectorAll('details')) part.open = true;
    theme(true);
  });
  addEventListener('afterprint', () => theme(false));
})();
"""

TEXT_COLUMNS = (
    "engine",
    "kind",
    "causes",
    "answers",
    "error",
    "traceback",
    "after",
    "what happened",
    "classes and scores",
    "measured",
    "kept",
    "adds",
    "",
)


@dataclass(frozen=True)
class Section:
    """One part of the page; without a body it is left out."""

    key: str
    title: str
    body: str


def page(title: str, lead: str, sections: Sequence[Section], plotly: str) -> str:
    """A whole page.

    Args:
        title: As text.
        lead: HTML above the sections.
        sections: In order.
        plotly: The library's source, or "" where the page has no plots.
    """
    shown = [s for s in sections if s.body]
    index = "".join(f'<a href="#{s.key}">{escape(s.title)}</a> ' for s in shown)
    body = "".join(
        f'<section id="{s.key}" aria-labelledby="{s.key}-title">'
        f'<h2 id="{s.key}-title">{escape(s.title)}</h2>\n{s.body}\n</section>\n'
        for s in shown
    )
    scripts = f"<script>{plotly}</script><script>{SCRIPT}</script>" if plotly else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body>\n'
        '<a class="skip" href="#content">To the content</a>'
        f"<header><h1>{escape(title)}</h1>\n"
        f'<nav aria-label="Sections" class="small">{index}</nav></header>\n'
        f'<main id="content">\n{lead}\n{body}</main>\n{scripts}</body></html>\n'
    )


def plot(key: str, figure: str, said: str, caption: str) -> str:
    """A plotly figure from its JSON.

    Args:
        key: An id.
        figure: JSON of the figure.
        said: What it shows, for those who do not see it; a table must hold the same numbers.
        caption: Below it.
    """
    safe = figure.replace("<", "\\u003c")
    return (
        f'<figure><div id="{key}" class="plot" role="img" aria-label="{escape(said)}"></div>'
        f'<script type="application/json" data-plot="{key}">{safe}</script>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def drawing(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def table(names: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table; its first column names the row."""
    kinds = [' class="text"' if n in TEXT_COLUMNS else "" for n in names]
    head = "".join(
        f'<th scope="col"{k}>{escape(n) or "mark"}</th>' for n, k in zip(names, kinds, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(_cell(c, k) for c, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{escape(caption or "Table")}">'
        f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, body: str) -> str:
    """Something that is opened on demand, and printed in any case."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def listed(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def paragraph(text: str) -> str:
    return f'<p class="soft small">{escape(text)}</p>'


def _cell(text: str, kind: str) -> str:
    return f"<td{kind}>{escape(text)}</td>"
