"""The run as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from search.picture import front_svg
from search.records import replacing
from search.results import Results
from search.tables import finetuned_rows, front_rows, layer_rows, score_rows

LAYERS = 25

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #5f6872;
  --line: #d0d7de; --mark: #0b6bcb; --ref: #b35900; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9aa4ae;
  --line: #30363d; --mark: #58a6ff; --ref: #f0a35e; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.advice { font-size: 1.1rem; border-left: 4px solid var(--mark); padding: .5rem 1rem;
  overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .9rem; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .soft { color: var(--soft); }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
.axis { stroke: var(--line); } .front { stroke: var(--mark); fill: none; stroke-width: 1.5; }
.point { fill: var(--mark); }
.tie { fill: var(--paper); stroke: var(--mark); stroke-width: 2; }
.reference { fill: var(--ref); } .other { fill: var(--soft); opacity: .45; }
.bar { stroke: var(--mark); opacity: .5; }
.level { stroke: var(--ref); stroke-dasharray: 5 4; }
g.dot:hover circle, g.dot:focus circle { stroke: var(--ink); stroke-width: 2; }
#tip { position: fixed; display: none; pointer-events: none; max-width: 26rem;
  white-space: pre-line; overflow-wrap: anywhere; background: var(--paper); font-size: .85rem;
  border: 1px solid var(--line); padding: .4rem .6rem; box-shadow: 0 2px 8px #0003; }
pre { background: color-mix(in srgb, var(--line) 35%, transparent); padding: .6rem;
  overflow-x: auto; }
@media print { body { margin: 0; max-width: none; } }
"""

SCRIPT = """
const tip = document.getElementById('tip');
for (const dot of document.querySelectorAll('g.dot')) {
  const show = (x, y) => {
    tip.textContent = dot.getAttribute('aria-label');
    tip.style.display = 'block';
    tip.style.left = Math.max(0, Math.min(x + 14, innerWidth - tip.offsetWidth - 8)) + 'px';
    tip.style.top = (y + 14) + 'px';
  };
  dot.addEventListener('mousemove', e => show(e.clientX, e.clientY));
  dot.addEventListener('focus', () => {
    const box = dot.getBoundingClientRect();
    show(box.x, box.y);
  });
  for (const end of ['mouseleave', 'blur'])
    dot.addEventListener(end, () => tip.style.display = 'none');
}
"""

LEGEND = (
    "Filled: on the front. Hollow: costs more, does less damage, and its metric cannot be told "
    "from a point's on these samples. Orange: plain int8, and the most harmful layers left in "
    "float. Grey: other plans. Bars: 95 % intervals, paired with float on the same samples."
)


def write_report(results: Results) -> Path:
    """Write ``report.html`` into the run directory."""
    path = results.folder / "report.html"
    with replacing(path) as file:
        file.write(html_report(results))
    return path


def html_report(results: Results) -> str:
    """One page: what to do, the front, the layers, how it was measured, how to repeat it."""
    title = f"quantfix: {Path(str(results.facts['config'])).stem} on {results.facts['target']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="advice">{escape(results.advice())}</p>',
        "<h2>Front: compute against int8 quality</h2>",
        front_svg(results),
        f'<p class="soft">{escape(LEGEND)}</p>',
        _table(*front_rows(results)),
        "<h2>For comparison: the most harmful layers left in float</h2>",
        _table(*score_rows(results.references)),
        *_trained(results),
        *_layers(results),
        *_failures(results),
        "<h2>How it was measured</h2>",
        _list(_measured(results)),
        "<h2>How to repeat it</h2>",
        _repeat(results),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f'\n<div id="tip" role="status"></div><script>{SCRIPT}</script></body></html>\n'
    )


def _trained(results: Results) -> list[str]:
    if not results.finetuned:
        return []
    said = "Before and after training; the control is the same training without the rewrites that cost MACs."
    return [
        "<h2>Fine-tuned</h2>",
        f'<p class="soft">{escape(said)}</p>',
        _table(*finetuned_rows(results)),
    ]


def _layers(results: Results) -> list[str]:
    found = results.sensitivity
    if found is None:
        return []
    said = (
        f"Each layer alone in int8, all others in float; {found.samples} samples, engine "
        f"{found.engine}. Where there is no drop, the damage is an estimate."
    )
    return [
        "<h2>What int8 breaks: layers, most harmful first</h2>",
        f'<p class="soft">{escape(said)}</p>',
        _table(*layer_rows(found, LAYERS)),
    ]


def _failures(results: Results) -> list[str]:
    rows = [[s.plan, s.error] for s in results.scores if s.error is not None]
    if not rows:
        return []
    return ["<h2>Plans that could not be scored</h2>", _table(["plan", "error"], rows)]


def _measured(results: Results) -> list[str]:
    facts = results.facts
    unit = (
        "mean KL divergence of the int8 from the float class distribution, in nats"
        if facts["task"] == "classification"
        else "squared error relative to the float outputs, averaged over output groups"
    )
    return [
        f"{results.samples} evaluation and {facts['calibration_samples']} calibration samples.",
        *_chosen(results),
        f"Target {facts['target']}; int8 outputs computed by {facts['engine']}.",
        "Intervals: 95 %, bootstrap of (int8 - float) on the same samples, added to the float "
        f"{results.metric}.",
        f"Damage: {unit}.",
        "MACs: convolutions, linear layers and matrix products of one input; batch norm and "
        "element-wise operations are not counted.",
        f"{len(results.scores)} plans scored, objective {results.objective}; {_limits(results)}.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".",
    ]


def _chosen(results: Results) -> list[str]:
    """On which images the plans were chosen, and what those say that were held back."""
    if not results.held_back:
        return []
    choosing = int(results.facts["samples"]) - results.held_back
    if not results.is_confirmed:
        return [
            f"All on the {choosing} images that choose; {results.held_back} are held back yet."
        ]
    gone = len(results.overtaken())
    said = f"Plans were chosen on {choosing} images and confirmed on {results.held_back} others; "
    said += f"{gone} of the chosen plans are beaten on all images and left out." if gone else ""
    said = said if gone else said + "none of the chosen plans is beaten on all images."
    return [said, results.luck()]


def _limits(results: Results) -> str:
    words = {
        "macs": lambda v: f"at most {v / 1e6:.1f} M MACs",
        "params": lambda v: f"at most {v / 1e6:.3f} M parameters",
        "weight_bytes": lambda v: f"at most {v:.0f} bytes of weights",
        "float_layers": lambda v: f"at most {v:.0f} layers in float",
        "float_islands": lambda v: f"at most {v:.0f} groups of them",
        "latency_ms": lambda v: f"at most {v:g} ms for one input on this machine",
    }
    limits = results.limits
    said = [word(limits[key]) for key, word in words.items() if limits.get(key) is not None]
    return ", ".join(said) or "no limits"


def _repeat(results: Results) -> str:
    config, folder = results.facts["config"], results.folder
    best = (results.best().plan if results.front.points else "") or "best"
    lines = [
        f"quantfix run {config} --out {folder}",
        f'quantfix export {folder} --pick "{best}"',
    ]
    return "<pre>" + escape("\n".join(lines), quote=False) + "</pre>"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(n)}</th>' for n in names)
    cells = ["".join(f"<td>{escape(c)}</td>" for c in row) for row in rows]
    body = "".join(f"<tr>{c}</tr>" for c in cells)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
