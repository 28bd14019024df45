"""The network as a graph to pan over: as it is above, rewritten below, equal layers in one column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from search.report.network_rows import Row, named

BOX_W, BOX_H, STEP, MARGIN = 122, 46, 140, 12
ARC = 46  # room above a band for edges that skip layers
BANDS = {"before": ARC + 22, "after": 2 * ARC + BOX_H + 66}
HEIGHT = BANDS["after"] + BOX_H + 34
LETTERS = 16
LEAST_HEAT = 0.04


def network_graph(
    rows: Sequence[Row], damage: Mapping[str, float], changes: Mapping[str, str], said: str
) -> str:
    """An SVG as wide as the network is long, in a frame that scrolls.

    Args:
        rows: Layers of both networks, equal ones side by side, in running order.
        damage: Of each layer alone in int8, by its name in the graph before any rewrite.
        changes: What a step does, in words, by its text.
        said: What it shows.
    """
    width = 2 * MARGIN + STEP * len(rows)
    worst = max(damage.values(), default=0.0) or 1.0
    drawn = [
        f'<text class="band" x="{MARGIN}" y="14">as it is</text>',
        f'<text class="band" x="{MARGIN}" y="{BANDS["after"] - ARC + 2}">rewritten</text>',
    ]
    for side in BANDS:
        drawn += _edges(rows, side)
    for column, row in enumerate(rows):
        x = MARGIN + STEP * column
        for side in BANDS:
            entry = row.before if side == "before" else row.after
            if entry is not None:
                heat = damage.get(str(entry["name"]), 0.0) / worst
                drawn.append(_box(row, side, x, heat, changes))
    return (
        f'<div class="graph" tabindex="0" role="group" aria-label="{escape(said)}">'
        f'<svg viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" data-width="{width}">'
        f"{''.join(drawn)}</svg></div>"
    )


def _box(row: Row, side: str, x: float, heat: float, changes: Mapping[str, str]) -> str:
    entry = row.before if side == "before" else row.after
    assert entry is not None
    y = BANDS[side]
    made = str(entry["made_by"]) if side == "after" else ""
    kind = ["node"]
    note = row.harm if side == "before" else ""
    if side == "before" and row.changed and row.after is None:
        kind.append("gone")
    if side == "after" and row.changed:
        kind.append("kept-float" if row.changed == "left in float" else "new")
        note = "left in float" if "kept-float" in kind else _rule(made)
    anchor = made.partition("@")[2] if made else ""
    origin = str(row.before["name"]) if row.before is not None else anchor or str(entry["name"])
    happened = changes.get(made, row.changed)
    title = "; ".join(t for t in (named(entry), row.harm, happened) if t)
    name = str(entry["layer"] or entry["name"])
    about = " ".join(t for t in (str(entry["kind"]), str(entry["size"]).partition(",")[0]) if t)
    warm = (
        f'<rect class="heat" x="{x}" y="{y}" width="{BOX_W}" height="{BOX_H}" rx="6" '
        f'fill-opacity="{0.08 + 0.72 * math.sqrt(heat):.2f}"/>'
        if heat > LEAST_HEAT and side == "before"
        else ""
    )
    below = (
        f'<text class="note" x="{x}" y="{y + BOX_H + 15}">{escape(_cut(note, 22))}</text>'
        if note
        else ""
    )
    return (
        f'<g class="{" ".join(kind)}" tabindex="0" role="button" data-layer="{escape(origin)}" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f'<rect x="{x}" y="{y}" width="{BOX_W}" height="{BOX_H}" rx="6"/>{warm}'
        f'<text x="{x + 8}" y="{y + 19}">{escape(_tail(name, LETTERS))}</text>'
        f'<text class="quiet" x="{x + 8}" y="{y + 36}">{escape(_cut(about, LETTERS))}</text>{below}</g>'
    )


def _edges(rows: Sequence[Row], side: str) -> list[str]:
    """Straight to the next box, in an arc over those that lie between."""
    entries = {
        str(e["name"]): (i, e)
        for i, r in enumerate(rows)
        if (e := r.before if side == "before" else r.after) is not None
    }
    present = sorted(i for i, _ in entries.values())
    y = BANDS[side]
    drawn: list[str] = []
    for column, entry in entries.values():
        for name in entry.get("reads", ()):
            if name not in entries:
                continue
            source = entries[name][0]
            between = [i for i in present if source < i < column]
            start, end = MARGIN + STEP * source + BOX_W, MARGIN + STEP * column
            if not between:
                path = f"M{start} {y + BOX_H / 2}H{end}"
            else:
                up = y - min(10 + 9 * math.log2(1 + len(between)), ARC - 8)
                a, b = start - BOX_W / 3, end + BOX_W / 3
                path = f"M{a:.0f} {y}C{a + 20:.0f} {up:.0f} {a + 20:.0f} {up:.0f} {a + 50:.0f} {up:.0f}"
                path += f"H{b - 50:.0f}C{b - 20:.0f} {up:.0f} {b - 20:.0f} {up:.0f} {b:.0f} {y}"
            drawn.append(f'<path class="edge" d="{path}"/>')
    return drawn


def jumps(rows: Sequence[Row], most: int = 10) -> list[tuple[str, str]]:
    """Layers to jump to, the most harmful first, then changed ones: name in the graph, and what is shown of it."""
    found: dict[str, str] = {}
    harmful: list[Any] = sorted((r for r in rows if r.harm and r.before), key=lambda r: r.harm)
    for row in (*harmful, *(r for r in rows if r.changed and r.before)):
        entry: Any = row.before
        found.setdefault(str(entry["name"]), str(entry["layer"] or entry["name"]))
    return list(found.items())[:most]


def _rule(step: str) -> str:
    return step.partition("@")[0].replace("_", " ") or "changed"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def _tail(text: str, most: int) -> str:
    """The end of a name, which tells layers of one network apart."""
    return text if len(text) <= most else f"\u2026{text[1 - most :]}"
