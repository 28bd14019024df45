"""The sensitivity of a network as a picture: ranked bars colored by cause, and the cumulative curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from search.report.cause_style import LOOKS, look
from search.run_dir.files import read_json

# The layers that are drawn; a bar too short to see says nothing.
MAX_LAYERS = 24
WIDTH, LABEL, RIGHT = 860, 250, 90
ROW, BAR = 22, 14
CURVE = 200
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1a1a1a}.soft{fill:#666}"
    ".axis{stroke:#bbb}.curve{fill:none;stroke:#0072b2;stroke-width:2}.measured{fill:#0072b2}"
    ".predicted{fill:#fff;stroke:#0072b2;stroke-width:2}"
)


def write_sensitivity_svg(folder: Path) -> Path:
    """Draw ``sensitivity.svg`` from the ``sensitivity.json`` of a run directory."""
    path = folder / "sensitivity.svg"
    content = read_json(folder / "sensitivity.json")
    path.write_text(sensitivity_svg(content), encoding="utf-8")
    return path


def sensitivity_svg(content: Mapping[str, Any]) -> str:
    """A file of its own: a bar for each of the most harmful layers, and below what leaving them in float brings.

    Args:
        content: that of sensitivity.json.
    """
    rows = [r for r in content["layers"] if r["damage"] > 0][:MAX_LAYERS]
    curve = content["curve"]
    named = [_cause(r) for r in rows]
    legend = [c for c in [*LOOKS, ""] if c in named]
    top = 58 + ROW * ((len(legend) + 2) // 3)
    under = top + ROW * len(rows) + 46
    height = under + (CURVE + 60 if len(curve) > 1 else 0)
    title = f"Damage of each layer alone in int8, {content['target']}"
    shown = f"{len(rows)} of {len(content['layers'])} layers, at most {content['layer_samples']} inputs"
    drawn = [
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="12" y="24" style="font-size:16px">{escape(title)}</text>',
        f'<text x="12" y="42" class="soft">{escape(shown)}; hollow: screened, full: measured</text>',
        *[_key(c, i) for i, c in enumerate(legend)],
        *_bars(rows, top),
        *(_curve(curve, under) if len(curve) > 1 else []),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'role="img" aria-label="{escape(title, quote=True)}">{"".join(drawn)}</svg>\n'
    )


def _cause(row: Mapping[str, Any]) -> str:
    return row["causes"][0] if row["causes"] else ""


def _key(cause: str, place: int) -> str:
    x, y = 12 + 280 * (place % 3), 62 + ROW * (place // 3)
    label = cause.replace("_", " ") or "no cause above its threshold"
    box = f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{look(cause).color}"/>'
    return f'{box}<text x="{x + 18}" y="{y}">{escape(label)}</text>'


def _bars(rows: Sequence[Mapping[str, Any]], top: float) -> list[str]:
    largest = max((r["damage"] for r in rows), default=1.0)
    found: list[str] = []
    for i, row in enumerate(rows):
        y, wide = top + ROW * i, (WIDTH - LABEL - RIGHT) * row["damage"] / largest
        color = look(_cause(row)).color
        fill = f'fill="{color}"' if row["exact"] else f'fill="#fff" stroke="{color}"'
        told = ", ".join(
            f"{c['cause']} {c['number']:g} (threshold {c['threshold']:g}) of {c['about']}"
            for c in row["evidence"]
        )
        about = f"{row['layer']} ({row['kind']}): damage {row['damage']:.4g}. {told}"
        found.append(
            f"<g><title>{escape(about)}</title>"
            f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end">{escape(_short(row["layer"]))}'
            f'</text><rect x="{LABEL}" y="{y + 1}" width="{max(wide, 1):.1f}" height="{BAR}" {fill}/>'
            f'<text x="{LABEL + wide + 6:.1f}" y="{y + 12}" class="soft">{row["damage"]:.3g}</text>'
            "</g>"
        )
    return found


def _short(name: str, most: int = 36) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def _curve(points: Sequence[Mapping[str, Any]], top: float) -> list[str]:
    """Damage of the network against the number of layers left in float, in ranked order."""
    left, right, bottom = 70, WIDTH - 40, top + CURVE
    most = max(p["float_layers"] for p in points)
    largest = max(p["damage"] for p in points) or 1.0

    def place(p: Mapping[str, Any]) -> tuple[float, float]:
        across = left + (right - left) * p["float_layers"] / max(most, 1)
        return across, bottom - (CURVE - 20) * p["damage"] / largest

    line = "L".join("{:.1f} {:.1f}".format(*place(p)) for p in points)
    found = [
        f'<text x="12" y="{top - 12}">Damage of the network with the first layers left in float'
        "</text>",
        f'<path class="axis" d="M{left} {top}V{bottom}H{right}" fill="none"/>',
        f'<path class="curve" d="M{line}"/>',
        f'<text x="{(left + right) / 2}" y="{bottom + 38}" text-anchor="middle" class="soft">'
        "layers in float (hollow: predicted)</text>",
    ]
    for p in points:
        x, y = place(p)
        kind = "measured" if p["measured"] else "predicted"
        metric = "" if p["metric"] is None else f", metric {p['metric']:.4f}"
        told = f"{p['float_layers']} layers in float, last {p['layer'] or '-'}: damage {p['damage']:.4g}"
        found.append(
            f"<g><title>{escape(told + metric)}</title>"
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>'
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{p["float_layers"]}</text>'
            f'<text x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle" class="soft">'
            f"{p['damage']:.3g}</text>"
        )
    return found
