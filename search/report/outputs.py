"""What the networks say on a few samples, side by side: boxes on images, scores over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from search.report.page import Section, folded, paragraph, table

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#f0e442")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 900, 200, 56, 12, 176
LINES = {
    "float": ("var(--soft)", ""),
    "plain int8": ("var(--gone)", "5 4"),
    "rewritten int8": ("var(--mark)", ""),
}


def outputs_section(exhibits: Mapping[str, Any] | None) -> Section:
    """Images with boxes, or curves; nothing for classification."""
    found = None if exhibits is None else exhibits["outputs"]
    if not found:
        return Section("outputs", "", "")
    if found["kind"] == "boxes":
        return Section("outputs", "The same images in float and in int8", _boxes(found))
    return Section("outputs", "Scores over time in float and in int8", _curves(found))


def _boxes(found: Mapping[str, Any]) -> str:
    least, names = found["least_score"], found.get("names", {})
    called = "class" if names else "class number"
    parts = [
        paragraph(
            "The two images of most damage in plain int8, and one of middling damage. Drawn: boxes with a score of "
            f"at least {least:g}, colored by class, with {called} and score; dashed: the labels."
        )
    ]
    rows: list[list[str]] = []
    for image in found["images"]:
        halves = [_image(image, name, names, i == 0) for i, name in enumerate(image["boxes"])]
        parts.append(
            f"<h3>Evaluation sample {image['sample']}</h3>"
            f'<div class="side">{"".join(halves)}</div>'
        )
        for name, boxes in image["boxes"].items():
            said = ", ".join(f"{_class(b, names)} ({b[5]:.2f})" for b in boxes) or "none"
            rows.append([f"sample {image['sample']}, {name}", str(len(boxes)), said])
        if image["truth"] is not None:
            said = ", ".join(_class(b, names) for b in image["truth"]) or "none"
            rows.append([f"sample {image['sample']}, labels", str(len(image["truth"])), said])
    listing = table(["image and network", "boxes", "classes and scores"], rows)
    return "".join(parts) + folded("The boxes as a table", listing)


def _class(box: Sequence[float], names: Mapping[str, str]) -> str:
    number = str(int(box[4]))
    return names.get(number, number)


def _image(image: Mapping[str, Any], name: str, names: Mapping[str, str], first: bool) -> str:
    width, height = image["size"]
    boxes, truth = image["boxes"][name], image["truth"] or []
    line = max(width, height) / 240
    drawn = [
        _rect(
            b,
            f"fill: none; stroke: #fff; stroke-opacity: .8; stroke-dasharray: {3 * line:.1f}",
            line * 0.8,
        )
        for b in truth
    ]
    for box in reversed(boxes):
        color = COLORS[int(box[4]) % len(COLORS)]
        size = max(width, height) / 26
        label = escape(f"{_class(box, names)}: {box[5]:.2f}")
        x, y = max(box[0], 0), max(box[1], size)
        drawn.append(_rect(box, f"fill: none; stroke: {color}", line))
        drawn.append(
            f'<text x="{x + line:.1f}" y="{y - line:.1f}" style="fill: #fff; stroke: {color}; '
            f'stroke-width: {size / 4:.1f}; paint-order: stroke; font-size: {size:.1f}px">{label}</text>'
        )
    key = f"sample-{image['sample']}"
    pixels = (
        f'<image id="{key}" href="data:image/jpeg;base64,{image["jpeg"]}" width="{width}" height="{height}"/>'
        if first  # the same pixels stand in the page once
        else f'<use href="#{key}"/>'
    )
    said = f"Sample {image['sample']} with {_count(boxes)} of the {name} network"
    return (
        f"<figure><h4>{escape(name)}: {_count(boxes)}</h4>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(said)}">'
        f"{pixels}{''.join(drawn)}</svg></figure>"
    )


def _count(boxes: Sequence[Any]) -> str:
    return "1 box" if len(boxes) == 1 else f"{len(boxes)} boxes"


def _rect(box: Sequence[float], style: str, line: float) -> str:
    x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{max(h, 0):.1f}" '
        f'style="{style}; stroke-width: {line:.2f}"/>'
    )


def _curves(found: Mapping[str, Any]) -> str:
    parts = [
        paragraph(
            "The two sequences of most damage in plain int8, and one of middling damage: the score of each frame. "
            "Shaded: frames whose label is 1. Gray: float, red and dashed: plain int8, blue: rewritten."
        )
    ]
    for sequence in found["sequences"]:
        names = list(sequence["scores"])
        rows = [
            [str(i), *(f"{sequence['scores'][n][i]:.4g}" for n in names)]
            + ([] if sequence["truth"] is None else [str(sequence["truth"][i])])
            for i in range(len(sequence["scores"]["float"]))
        ]
        head = ["frame", *names] + ([] if sequence["truth"] is None else ["label"])
        parts.append(
            f"<h3>Evaluation sequence {sequence['sample']}</h3>"
            f"<figure>{_curve(sequence)}<figcaption>{escape(_apart(sequence))}</figcaption></figure>"
            + folded("The scores as a table", table(head, rows))
        )
    return "".join(parts)


def _apart(sequence: Mapping[str, Any]) -> str:
    """The largest distance of each int8 score from float."""
    truth = sequence["scores"]["float"]
    said = [
        f"{name} up to {max(abs(a - b) for a, b in zip(scores, truth, strict=True)):.3g}"
        for name, scores in sequence["scores"].items()
        if name != "float"
    ]
    return f"Away from float: {', '.join(said)}."


def _curve(sequence: Mapping[str, Any]) -> str:
    values = [v for scores in sequence["scores"].values() for v in scores]
    low, high = min(values), max(values)
    frames = len(sequence["scores"]["float"])

    def x(frame: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * frame / max(frames - 1, 1)

    def y(value: float) -> float:
        return BOTTOM - (value - low) / (high - low or 1.0) * (BOTTOM - TOP)

    half = 0.5 * (x(1) - x(0)) if frames > 1 else 4.0
    drawn = [
        f'<rect x="{max(x(i) - half, LEFT):.1f}" y="{TOP}" width="{2 * half:.1f}" height="{BOTTOM - TOP}" '
        'style="fill: var(--newbox)"/>'
        for i, label in enumerate(sequence["truth"] or ())
        if label == 1
    ]
    drawn.append(f'<line class="axis" x1="{LEFT}" y1="{BOTTOM}" x2="{WIDTH}" y2="{BOTTOM}"/>')
    drawn += [
        f'<text class="quiet" x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>'
        for v in (low, high)
    ]
    drawn += [
        f'<text class="quiet" x="{x(f):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{f}</text>'
        for f in sorted({0, frames // 2, frames - 1})
    ]
    for name, scores in sequence["scores"].items():
        color, dash = LINES.get(name, ("var(--ref)", "2 3"))
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(scores))
        drawn.append(
            f'<polyline points="{points}" style="fill: none; stroke: {color}; stroke-width: 2; '
            f'stroke-dasharray: {dash or "none"}"><title>{escape(name)}</title></polyline>'
        )
    said = (
        f"Scores of {frames} frames by {', '.join(sequence['scores'])}; numbers in the table below"
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="{escape(said)}">'
        f"{''.join(drawn)}</svg>"
    )
