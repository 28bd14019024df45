"""Ranges of the channels of a layer, before and after, as small multiples that stay readable when one channel is a million."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from search.report.page import Section, folded, paragraph, table

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 260, 124, 46, 8, 116
SIDES = {"weights": "weights", "reads": "what it reads", "writes": "what it writes"}
ROWS = 12
# Where the widest channel, or what int8 can hold, is so many times the median one, a linear axis would show nothing of the others.
LINEAR_SPREAD = 30.0
HOW = (
    "One bar for each channel, from its lowest to its highest value, the widest first; of many channels an even choice. "
    "The dashed lines are what int8 can hold: one pair for the tensor, or marks for each channel. int8 has 255 steps "
    "between them, so a channel whose bar is a hundredth of the range has two or three. Where one channel is far wider than the "
    "others the axis is logarithmic on both sides of zero. Spread: the widest channel over the median one. Activations: "
)


def ranges_section(exhibits: Mapping[str, Any] | None) -> Section:
    """The most harmful layers at once, the worst mismatch first; any other when it is clicked in the network."""
    title = "Ranges of the channels"
    if exhibits is None or not exhibits["ranges"]:
        return Section("ranges", title, "")
    entries, shown = exhibits["ranges"], int(exhibits["ranges_shown"])
    samples = exhibits["calibration_samples"]
    names = ["layer", *(f"{s}, spread" for s in SIDES.values())]
    parts = [paragraph(f"{HOW}{samples} calibration samples.")]
    parts += [_panel(e, hidden=i >= max(shown, 1)) for i, e in enumerate(entries)]
    listing = table(names, [_spreads(r) for r in entries], "Spread before, and after")
    parts.append(folded("Spread of all layers as a table", listing))
    return Section("ranges", title, "".join(parts))


def ranges_svg(tensors: Sequence[Mapping[str, Any]], said: str) -> str:
    """Vertical bars from low to high; several tensors (a layer that was split) side by side.

    Args:
        tensors: With ``channels``, ``low``, ``high`` by channel and ``limits``; all on one scale of values.
        said: What it shows.
    """
    y, ticks = _axis(tensors)
    drawn = [f'<line class="axis" x1="{LEFT}" y1="{y(0):.1f}" x2="{WIDTH}" y2="{y(0):.1f}"/>']
    drawn += [
        f'<text class="quiet" x="{LEFT - 5}" y="{y(v) + 4:.1f}" text-anchor="end">{_short(v)}</text>'
        for v in ticks
    ]
    share = (WIDTH - LEFT - 8 * (len(tensors) - 1)) / len(tensors)
    for k, tensor in enumerate(tensors):
        start = LEFT + k * (share + 8)
        step = share / len(tensor["low"])
        bars: list[str] = []
        pairs = _pairs(tensor)
        for i, (low, high) in enumerate(zip(tensor["low"], tensor["high"], strict=True)):
            middle = start + (i + 0.5) * step
            top, bottom = y(max(high, low)), y(min(high, low))
            bars.append(f"M{middle:.1f} {top:.1f}V{max(bottom, top + 1):.1f}")
        drawn.append(
            f'<path class="range" d="{"".join(bars)}" stroke-width="{max(step * 0.72, 0.8):.1f}"/>'
        )
        ends = (
            [
                (start + i * step, start + (i + 0.8) * step, v)
                for i, p in enumerate(pairs)
                for v in p
            ]
            if len(pairs) > 1
            else [(start, start + share, v) for p in pairs for v in p]
        )
        limits = "".join(f"M{a:.1f} {y(v):.1f}H{b:.1f}" for a, b, v in ends)
        if limits:
            drawn.append(f'<path class="limit" d="{limits}"/>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{escape(said)}">'
        f"{''.join(drawn)}</svg>"
    )


def _axis(tensors: Sequence[Mapping[str, Any]]) -> tuple[Any, list[float]]:
    """Where a value is drawn, and which values are written beside the axis."""
    values = [v for t in tensors for k in ("low", "high") for v in t[k]]
    values += [v for t in tensors for pair in _pairs(t) for v in pair]
    bottom, top = min(0.0, *values), max(0.0, *values)
    widths = sorted(w for t in tensors for w in _widths(t) if w > 0)
    middle = widths[len(widths) // 2] if widths else 1.0
    extent = top - bottom or 1.0
    # linear up to a tenth of the median channel, beyond by decades
    linear = middle / 10 if widths and max(top, -bottom) > LINEAR_SPREAD * middle else 0.0

    def bent(value: float) -> float:
        return math.asinh(value / linear) if linear else value

    low, high = bent(bottom), bent(top)

    def y(value: float) -> float:
        return BOTTOM - (bent(value) - low) / (high - low or 1.0) * (BOTTOM - TOP)

    far = sorted({top, bottom} - {0.0}, key=abs, reverse=True)
    ticks = [v for i, v in enumerate(far) if not i or abs(y(v) - y(far[0])) > 12]
    if linear:
        size = max(abs(top), abs(bottom))
        for power in range(math.floor(math.log10(size)), math.floor(math.log10(linear)), -1):
            for value in (10.0**power, -(10.0**power)):
                clear = all(abs(y(value) - y(t)) > 13 for t in (*ticks, 0.0))
                if bottom <= value <= top and clear:
                    ticks.append(value)
    if all(abs(y(0) - y(t)) > 11 for t in ticks) and extent:
        ticks.append(0.0)
    return y, ticks


def _short(value: float) -> str:
    """A number of at most six characters."""
    said = f"{value:.2g}"
    return said.replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def _panel(entry: Mapping[str, Any], hidden: bool) -> str:
    """One layer: what it holds, reads and writes, as it is above and rewritten below."""
    rows: list[str] = []
    for side, word in (("before", "as it is"), ("after", "rewritten")):
        figures = [
            _figure(entry, side, word, key) for key in SIDES if entry.get(side, {}).get(key)
        ]
        rows += [f'<div class="multiples">{"".join(figures)}</div>'] if figures else []
    state = " hidden" if hidden else ""
    listing = folded(f"The widest channels of {entry['layer']} as a table", _table(entry))
    return (
        f'<article class="ranges" id="ranges-{escape(entry["node"])}"{state}>'
        f'<h3>{escape(entry["layer"])}</h3><div class="pair">{"".join(rows)}</div>'
        f"{listing if not hidden else ''}</article>"
    )


def _figure(entry: Mapping[str, Any], side: str, word: str, key: str) -> str:
    tensors = entry[side][key]
    factor = entry["spread"][side][key]
    known = "" if factor is None else f", spread {factor:.3g}"
    count = sum(t["count"] for t in tensors)
    parts = f" in {len(tensors)} tensors" if len(tensors) > 1 else ""
    caption = f"{SIDES[key]}, {word}: {count} channels{parts}{known}"
    caption += "" if any(_pairs(t) for t in tensors) else ", in float"
    said = f"{entry['layer']}, {caption}"
    return (
        f"<figure>{ranges_svg(tensors, said)}<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _pairs(tensor: Mapping[str, Any]) -> list[Sequence[float]]:
    """[low, high] of the tensor, or of each channel; nothing in float."""
    limits = tensor["limits"]
    if limits is None:
        return []
    return limits if isinstance(limits[0], list | tuple) else [limits]


def _widths(tensor: Mapping[str, Any]) -> list[float]:
    return [max(h, 0.0) - min(v, 0.0) for v, h in zip(tensor["low"], tensor["high"], strict=True)]


def _spreads(entry: Mapping[str, Any]) -> list[str]:
    cells: list[str] = [entry["layer"]]
    for key in SIDES:
        known = [entry["spread"].get(side, {}).get(key) for side in ("before", "after")]
        cells.append(" \u2192 ".join(f"{v:.3g}" for v in known if v is not None))
    return cells


def _table(entry: Mapping[str, Any]) -> str:
    rows: list[list[str]] = []
    for key, word in SIDES.items():
        for side in ("before", "after"):
            for tensor in entry.get(side, {}).get(key, ()):
                rows += [
                    [
                        f"{word}, {side}: {tensor['name']}",
                        str(tensor["channels"][i]),
                        f"{tensor['low'][i]:.4g}",
                        f"{tensor['high'][i]:.4g}",
                    ]
                    for i in range(min(ROWS // 3, len(tensor["low"])))
                ]
    return table(["tensor", "channel", "low", "high"], rows)
