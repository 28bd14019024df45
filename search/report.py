"""The run as one HTML page that needs no network, and as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from search.records import Score, replacing
from search.results import Results
from search.tables import front_rows, layer_rows, percent, score_rows

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 72, 20, 20, 56

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #6a737d; --line: #d0d7de; --mark: #0b6bcb; --ref: #b35900; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9aa4ae; --line: #30363d; --mark: #58a6ff; --ref: #f0a35e; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.advice { font-size: 1.1rem; border-left: 4px solid var(--mark); padding: .5rem 1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
td.text { text-align: left; }
.wide { overflow-x: auto; } small, .soft { color: var(--soft); }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
.axis { stroke: var(--line); } .front { stroke: var(--mark); fill: none; stroke-width: 1.5; }
.point { fill: var(--mark); } .tie { fill: var(--paper); stroke: var(--mark); stroke-width: 2; }
.reference { fill: var(--ref); } .other { fill: var(--soft); opacity: .45; }
.bar { stroke: var(--mark); opacity: .5; } .level { stroke: var(--ref); stroke-dasharray: 5 4; }
g.dot:hover circle, g.dot:focus circle { stroke: var(--ink); stroke-width: 2; }
#tip { position: fixed; display: none; pointer-events: none; max-width: 26rem; white-space: pre-line; overflow-wrap: anywhere;
  background: var(--paper); border: 1px solid var(--line); padding: .4rem .6rem; font-size: .85rem; box-shadow: 0 2px 8px #0003; }
pre { background: color-mix(in srgb, var(--line) 35%, transparent); padding: .6rem; overflow-x: auto; }
@media print { body { margin: 0; max-width: none; } }
"""

SCRIPT = """
const tip = document.getElementById('tip');
for (const dot of document.querySelectorAll('g.dot')) {
  const show = (x, y) => { tip.textContent = dot.getAttribute('aria-label'); tip.style.display = 'block';
    tip.style.left = Math.min(x + 14, innerWidth - tip.offsetWidth - 8) + 'px'; tip.style.top = (y + 14) + 'px'; };
  dot.addEventListener('mousemove', e => show(e.clientX, e.clientY));
  dot.addEventListener('focus', () => { const b = dot.getBoundingClientRect(); show(b.x, b.y); });
  for (const leave of ['mouseleave', 'blur']) dot.addEventListener(leave, () => tip.style.display = 'none');
}
"""


def write_report(results: Results) -> Path:
    """Write ``report.html`` into the run directory."""
    path = results.folder / "report.html"
    with replacing(path) as file:
        file.write(html_report(results))
    return path


def html_report(results: Results) -> str:
    """One self-contained page: what to do, the front, the layers, how it was measured, how to repeat it."""
    facts = results.facts
    title = f"quantfix: {Path(str(facts['config'])).stem} on {facts['target']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="advice">{escape(results.advice())}</p>',
        "<h2>Front: compute against int8 quality</h2>",
        front_svg(results),
        '<p class="soft">Filled: on the front. Hollow: costs more, does less damage, and its metric cannot be told from a'
        " point's on these samples. Orange: plain int8 and the most harmful layers left in float. Bars: 95 % intervals,"
        " paired with float on the same samples.</p>",
        _html_table(*front_rows(results)),
        "<h2>For comparison: most harmful layers left in float</h2>",
        _html_table(*score_rows(results.references)),
    ]
    if results.sensitivity is not None:
        parts += [
            "<h2>What int8 breaks: layers, most harmful first</h2>",
            f'<p class="soft">Each layer alone in int8, all others in float; {results.sensitivity.samples} samples,'
            f" engine {escape(results.sensitivity.engine)}. Damage: {_damage_unit(results)}.</p>",
            _html_table(*layer_rows(results.sensitivity, 25)),
        ]
    failed = [s for s in results.scores if s.error is not None]
    if failed:
        rows = [[s.plan, s.error or ""] for s in failed]
        parts += ["<h2>Plans that could not be scored</h2>", _html_table(["plan", "error"], rows)]
    parts += [
        "<h2>How it was measured</h2>",
        _measured(results),
        "<h2>How to repeat it</h2>",
        _repeat(results),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f'<body>\n{body}\n<div id="tip" role="status"></div><script>{SCRIPT}</script></body></html>\n'
    )


def front_svg(results: Results) -> str:
    """The front as a picture: every scored plan, each with its facts for mouse, keyboard and screen reader."""
    shown = [s for s in results.scores if s.error is None and _value(results, s) is not None]
    if not shown:
        return "<p>No plan is scored yet.</p>"
    points, ties = {s.plan for s in results.front.points}, {s.plan for s in results.front.ties}
    references = {s.plan for s in results.references}
    level = results.baseline.float if results.objective == "metric" else None
    ratios = [s.macs_ratio for s in shown]
    values = [v for s in shown if (v := _value(results, s)) is not None]
    bounds = [
        b
        for s in shown
        if s.plan in points and results.objective == "metric"
        for b in s.interval or ()
    ]
    x = _Scale(min(ratios), max(ratios), LEFT, WIDTH - RIGHT)
    y = _Scale(
        min([*values, *bounds, *_given(level)]),
        max([*values, *bounds, *_given(level)]),
        HEIGHT - BOTTOM,
        TOP,
    )
    unit = "{:.1%}" if results.objective == "metric" else "{:.3g}"
    drawn = [
        f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>',
        f'<line class="axis" x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{HEIGHT - BOTTOM}"/>',
    ]
    for value in x.ticks:
        drawn.append(
            f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:.3g}</text>'
        )
    for value in y.ticks:
        drawn.append(
            f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{unit.format(value)}</text>'
        )
    name = results.metric if results.objective == "metric" else "damage (lower is better)"
    drawn.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">MACs relative to the network as it is</text>'
    )
    drawn.append(
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(name)}, int8</text>'
    )
    if level is not None:
        drawn.append(
            f'<line class="level" x1="{LEFT}" y1="{y(level):.1f}" x2="{WIDTH - RIGHT}" y2="{y(level):.1f}"/>'
        )
        drawn.append(
            f'<text x="{WIDTH - RIGHT}" y="{y(level) - 5:.1f}" text-anchor="end">float {unit.format(level)}</text>'
        )
    corners = [(x(s.macs_ratio), y(_value(results, s) or 0.0)) for s in results.front.points]
    if len(corners) > 1:
        path = f"M{corners[0][0]:.1f} {corners[0][1]:.1f}" + "".join(
            f"H{a:.1f}V{b:.1f}" for a, b in corners[1:]
        )
        drawn.append(f'<path class="front" d="{path}"/>')
    rank = {True: 1, False: 0}
    for s in sorted(
        shown,
        key=lambda s: (rank[s.plan in points], rank[s.plan in ties], rank[s.plan in references]),
    ):
        kind = (
            "point"
            if s.plan in points
            else "tie"
            if s.plan in ties
            else "reference"
            if s.plan in references
            else "other"
        )
        here = x(s.macs_ratio), y(_value(results, s) or 0.0)
        bar = ""
        if kind == "point" and s.interval is not None and results.objective == "metric":
            low, high = (y(b) for b in s.interval)
            bar = f'<line class="bar" x1="{here[0]:.1f}" y1="{low:.1f}" x2="{here[0]:.1f}" y2="{high:.1f}"/>'
        label = escape(_facts(results, s), quote=True)
        drawn.append(
            f'<g class="dot" tabindex="0" role="img" aria-label="{label}">{bar}'
            f'<circle class="{kind}" cx="{here[0]:.1f}" cy="{here[1]:.1f}" r="{3.5 if kind == "other" else 6}"/></g>'
        )
    summary = f"{len(points)} plans on the front, {len(shown)} scored"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="group" aria-label="{escape(summary)}">'
        + "".join(drawn) + "</svg>"
    )  # fmt: skip


def _html_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(n)}</th>' for n in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _measured(results: Results) -> str:
    facts = results.facts
    lines = [
        f"{facts['samples']} evaluation samples, {facts['calibration_samples']} calibration samples.",
        f"Target {facts['target']}; int8 outputs computed by {facts['engine']}.",
        f"Intervals: 95 %, bootstrap of (int8 - float) on the same samples, added to the float {results.metric}.",
        f"Damage: {_damage_unit(results)}.",
        "MACs: convolutions, linear layers and matrix products of one input; batch norm and element-wise operations are"
        " not counted.",
        f"{len(results.scores)} plans scored, objective {results.objective}; limits: {_limits(results)}.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".",
    ]
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _repeat(results: Results) -> str:
    config, folder = results.facts["config"], results.folder
    best = results.best().plan if results.front.points else ""
    return (
        f"<pre>quantfix run {escape(str(config))} --out {escape(str(folder))}\n"
        f'quantfix export {escape(str(folder))} --pick "{escape(best) or "best"}"</pre>'
    )


def _facts(results: Results, score: Score) -> str:
    lines = [
        score.plan.replace(" ", "\n") or "the network as it is",
        f"{score.macs / 1e6:.1f} M MACs ({score.macs_ratio - 1:+.1%}), {score.float_layers} layers in float",
    ]
    if score.metric is not None:
        low, high = score.interval or (score.metric, score.metric)
        lines.append(
            f"int8 {results.metric} {score.metric:.2%} [{low:.2%}, {high:.2%}], in float {percent(score.metric_float)}"
        )
    lines.append(f"damage {score.damage:.4g}; {score.engine}, {score.samples} samples")
    return "\n".join(lines)


def _value(results: Results, score: Score) -> float | None:
    return score.damage if results.objective == "damage" else score.metric


def _damage_unit(results: Results) -> str:
    if results.facts["task"] == "classification":
        return "mean KL divergence of the int8 from the float class distribution, in nats"
    return "squared error relative to the float outputs, averaged over output groups"


def _limits(results: Results) -> str:
    macs, floats = results.limits.get("macs"), results.limits.get("float_layers")
    said = [f"at most {macs / 1e6:.1f} M MACs"] if macs is not None else []
    said += [f"at most {floats:.0f} layers in float"] if floats is not None else []
    return ", ".join(said) or "none"


def _given(value: float | None) -> list[float]:
    return [] if value is None else [value]


class _Scale:
    """Maps [low, high], a little widened, to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
        self.low, self.high, self.start, self.end = low - room, high + room, start, end
        self.ticks: list[float] = (
            [low + (high - low) * i / 4 for i in range(5)] if high > low else [low]
        )

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)
