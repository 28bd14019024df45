"""Ranges of the channels of the most harmful layers, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from search.report.page import Section, folded, paragraph, table

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 420, 170, 64, 10, 150
MAX_CHANNELS = 170  # channels that fit side by side; of more the widest and an even choice of the others are drawn
SIDES = {"weights": "weights", "reads": "what it reads", "writes": "what it writes"}
ROWS = 12


def ranges_section(exhibits: Mapping[str, Any] | None) -> Section:
    """For each harmful layer its weights and activations by channel, the worst mismatch first."""
    title = "Ranges of the channels of the most harmful layers"
    if exhibits is None or not exhibits["ranges"]:
        return Section("ranges", title, "")
    samples = exhibits["calibration_samples"]
    parts = [
        paragraph(
            "One bar for each channel, from its lowest to its highest value, the widest first. The dashed lines are "
            "what int8 can hold: one pair for the tensor, or marks for each channel. int8 has 255 steps between "
            f"them, so a channel whose bar is a hundredth of the range has two or three. Activations: {samples} "
            "calibration samples. Spread: the widest channel over the median one."
        ),
        table(
            ["layer", *(f"{s}, spread" for s in SIDES.values())],
            [_spreads(r) for r in exhibits["ranges"]],
            "Spread before, and after",
        ),
    ]
    for entry in exhibits["ranges"]:
        parts.append(f"<h3>{escape(entry['layer'])}</h3>")
        parts += [_pair(entry, key) for key in SIDES if entry["before"][key]]
        parts.append(folded(f"The widest channels of {entry['layer']} as a table", _table(entry)))
    return Section("ranges", title, "".join(parts))


def ranges_svg(tensors: Sequence[Mapping[str, Any]], said: str) -> str:
    """Vertical bars from low to high; several tensors (a layer that was split) side by side.

    Args:
        tensors: With ``low``, ``high`` by channel and ``limits``; all on one scale of values.
        said: What it shows.
    """
    lows, highs = ([v for t in tensors for v in t[k]] for k in ("low", "high"))
    limits = [v for t in tensors for pair in _pairs(t) for v in pair]
    bottom, top = min(0.0, *lows, *limits), max(0.0, *highs, *limits)
    extent = top - bottom or 1.0

    def y(value: float) -> float:
        return BOTTOM - (value - bottom) / extent * (BOTTOM - TOP)

    drawn = [
        f'<line class="axis" x1="{LEFT}" y1="{y(0):.1f}" x2="{WIDTH}" y2="{y(0):.1f}"/>',
        *[
            f'<text class="quiet" x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>'
            for v in sorted({top, bottom, 0.0 if min(top, -bottom) > 0.12 * extent else top})
        ],
    ]
    share = (WIDTH - LEFT - 8 * (len(tensors) - 1)) / len(tensors)
    for k, tensor in enumerate(tensors):
        start = LEFT + k * (share + 8)
        shown = _picked(tensor)
        step = share / len(shown)
        pairs = _pairs(tensor)
        for i, channel in enumerate(shown):
            low, high = float(tensor["low"][channel]), float(tensor["high"][channel])
            x, upper = start + i * step, y(max(high, low))
            size = max(y(min(high, low)) - upper, 1.0)
            width = max(step * 0.72, 0.8)
            drawn.append(
                f'<rect x="{x:.1f}" y="{upper:.1f}" width="{width:.1f}" height="{size:.1f}" '
                f'style="fill: var(--mark)"><title>channel {channel}: {low:.4g} to {high:.4g}</title></rect>'
            )
            if len(pairs) > 1:
                drawn += [_limit(x, x + width, y(v)) for v in pairs[channel]]
        if len(pairs) == 1:
            drawn += [_limit(start, start + share, y(v)) for v in pairs[0]]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT - 12}" width="100%" role="img" aria-label="{escape(said)}">'
        f"{''.join(drawn)}</svg>"
    )


def _pair(entry: Mapping[str, Any], key: str) -> str:
    """The same tensors before and after, side by side."""
    halves: list[str] = []
    for side, word in (("before", "as it is"), ("after", "rewritten")):
        tensors = entry.get(side, {}).get(key)
        if not tensors:
            continue
        factor = entry["spread"][side][key]
        known = "" if factor is None else f", spread {factor:.3g}"
        count = sum(len(t["low"]) for t in tensors)
        parts = f" in {len(tensors)} tensors" if len(tensors) > 1 else ""
        caption = f"{SIDES[key]}, {word}: {count} channels{parts}{known}"
        caption += "" if any(_pairs(t) for t in tensors) else ", in float"
        said = f"{entry['layer']}, {caption}; numbers in the table below"
        halves.append(
            f"<figure>{ranges_svg(tensors, said)}<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return f'<div class="side">{"".join(halves)}</div>'


def _limit(x1: float, x2: float, y: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y:.1f}" '
        'style="stroke: var(--ref); stroke-dasharray: 5 3; stroke-width: 1.3"/>'
    )


def _pairs(tensor: Mapping[str, Any]) -> list[Sequence[float]]:
    """[low, high] of the tensor, or of each channel; nothing in float."""
    limits = tensor["limits"]
    if limits is None:
        return []
    return limits if isinstance(limits[0], list | tuple) else [limits]


def _widths(tensor: Mapping[str, Any]) -> list[float]:
    return [max(h, 0.0) - min(v, 0.0) for v, h in zip(tensor["low"], tensor["high"], strict=True)]


def _picked(tensor: Mapping[str, Any]) -> list[int]:
    """The channels that are drawn, the widest first."""
    widths = _widths(tensor)
    order = sorted(range(len(widths)), key=lambda c: -widths[c])
    if len(order) <= MAX_CHANNELS:
        return order
    rest = order[MAX_CHANNELS // 4 :]
    count = MAX_CHANNELS - MAX_CHANNELS // 4
    return order[: MAX_CHANNELS // 4] + [rest[i * len(rest) // count] for i in range(count)]


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
                        str(c),
                        f"{tensor['low'][c]:.4g}",
                        f"{tensor['high'][c]:.4g}",
                    ]
                    for c in _picked(tensor)[: ROWS // 3]
                ]
    return table(["tensor", "channel", "low", "high"], rows)
