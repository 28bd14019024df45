"""What int8 loses where, as sections of the page: scores of a detector, classes and images of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from search.report.page import Section, paragraph, table


def losses_section(exhibits: Mapping[str, Any] | None) -> Section:
    """Score shift with the threshold to use, or loss by class with the worst images."""
    found = None if exhibits is None else exhibits.get("losses")
    if not found:
        return Section("losses", "", "")
    if found["kind"] == "shift":
        return Section("losses", "Scores in int8, and the threshold to use", _shift(found))
    return Section("losses", "What int8 loses, by class and image", _classes(found))


def shift_said(shift: Mapping[str, Any]) -> str:
    """The shift of the scores in one sentence."""
    lost = f"; {shift['lost']} boxes of float are gone" if shift["lost"] else ""
    middle, low, high = (round(shift[k], 3) + 0.0 for k in ("median", "low", "high"))
    return (
        f"{middle:+.3f} in the middle, half of them between {low:+.3f} and {high:+.3f} "
        f"({shift['pairs']} boxes on {shift['images']} images{lost})"
    )


def _shift(found: Mapping[str, Any]) -> str:
    lines = [f"{name}: {shift_said(s)}" for name, s in found["networks"].items()]
    names = ["network", "chosen in float", "boxes per image", "precision", "recall"]
    names += ["same recall at", "precision there", "same precision at", "recall there"]
    rows = [
        [
            name,
            f"{p['threshold']:g}",
            _pair(p["boxes"], "{:.2f}"),
            _pair(p["precision"], "{:.1%}"),
            _pair(p["recall"], "{:.1%}"),
            _number(p["restored"], "{:.3f}"),
            _number(p["restored_precision"], "{:.1%}"),
            _number(p["precise"], "{:.3f}"),
            _number(p["precise_recall"], "{:.1%}"),
        ]
        for name, s in found["networks"].items()
        for p in s["points"]
    ]
    caption = (
        "A threshold that was chosen in float, what it does in float and in int8, and the threshold at which int8 has the float "
        "network's recall or precision (without labels: its number of boxes). Boxes are the same from an IoU of .5."
    )
    told = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<p>Scores of the same boxes, int8 minus float:</p><ul>{told}</ul>{table(names, rows, caption)}"


def _pair(values: Any, form: str) -> str:
    return "" if values is None else " \u2192 ".join(form.format(v) for v in values)


def _number(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def _classes(found: Mapping[str, Any]) -> str:
    names, shipped = found["names"], found["shipped"]
    networks = list(found["worst"][0]["said"]) if found["worst"] else []
    said = f"{found['changed']} of {found['images']} images get another answer in {shipped} than in float."
    parts = [paragraph(said)]
    worst = [w for w in found["worst"] if w["said"][shipped] != w["said"]["float"]]
    if worst:
        parts.append(f'<div class="side">{"".join(_image(w, names) for w in worst)}</div>')
    lost = [r for r in found["classes"] if r["right"][shipped] != r["right"]["float"]]
    if lost:
        rows = [
            [_named(r["class"], names), str(r["images"]), *(str(r["right"][n]) for n in networks)]
            for r in lost
        ]
        caption = "Right answers by class, those with the largest loss first"
        parts.append(table(["class", "images", *networks], rows, caption))
    elif found["classes"]:
        parts.append(paragraph("No class has more or fewer right answers than in float."))
    return "".join(parts)


def _image(worst: Mapping[str, Any], names: Mapping[str, str]) -> str:
    label = "" if worst["label"] is None else f"label {_named(worst['label'], names)}; "
    said = ", ".join(f"{n}: {_named(c, names)}" for n, c in worst["said"].items())
    told = escape(f"sample {worst['sample']}: {label}{said}; damage {worst['damage']:.3g}")
    picture = (
        f'<img alt="Sample {worst["sample"]}" src="data:image/jpeg;base64,{worst["jpeg"]}">'
        if worst["jpeg"]
        else ""
    )
    return f"<figure>{picture}<figcaption>{told}</figcaption></figure>"


def _named(number: int, names: Mapping[str, str]) -> str:
    return names.get(str(number), str(number))
