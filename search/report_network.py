"""The network before and after, layer by layer, with what changed marked."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from search.report_page import Section, drawing, folded, paragraph, table

WIDTH, ROW, BOX = 980, 34, 26
COLUMN, LEFT, RIGHT = 420, 20, 540
AROUND = 1  # unchanged layers that are shown beside a changed one
LONGEST = 54


@dataclass(frozen=True)
class Row:
    """One line of the picture: the layer before and after, either of them None; or so many left out."""

    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    left_out: int = 0

    @property
    def changed(self) -> str:
        """What happened, in words; "" where nothing did."""
        if self.before is None and self.after is not None:
            return f"new, by {self.after['made_by'] or 'a rewrite'}"
        if self.after is None:
            return "replaced" if self.before is not None else ""
        if self.after["in_float"] and self.before is not None and not self.before["in_float"]:
            return "left in float"
        if self.before is not None and self.before["size"] != self.after["size"]:
            return f"{self.before['size']} becomes {self.after['size']}"
        return f"by {self.after['made_by']}" if self.after["made_by"] else ""


def network_section(exhibits: Mapping[str, Any] | None) -> Section:
    """The picture, its table, and the steps that act everywhere."""
    title = "The network before and after"
    if exhibits is None:
        return Section("network", title, "")
    plan = str(exhibits["plan"])
    if not plan:
        return Section(
            "network",
            title,
            paragraph("Nothing is to be changed: the best plan is the empty one."),
        )
    everywhere = [s.partition("@")[0] for s in plan.split() if s.endswith("@model")]
    rows = aligned(exhibits["before"], exhibits["after"])
    changed = [r for r in rows if r.changed]
    said = f"{len(changed)} of {len(rows)} layers are new, replaced, changed or left in float"
    parts: list[str] = []
    if everywhere:
        parts.append(
            paragraph(
                f"Throughout the network, without a change of its layers: {', '.join(everywhere)}. "
                "They act on weights, biases and ranges only."
            )
        )
    if not changed:
        parts.append(paragraph("No layer is added, replaced or left in float by this plan."))
    else:
        parts.append(
            drawing(
                network_svg(rows, said),
                f"Left: as it is. Right: rewritten. {said}; green: new or "
                "changed, red: replaced, amber: left in float. Runs of unchanged layers are left out.",
            )
        )
        named = [[_named(r.before), _named(r.after), r.changed] for r in changed]
        parts.append(
            folded("The changes as a table", table(["before", "after", "what happened"], named))
        )
    return Section("network", title, "".join(parts))


def aligned(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The layers of both networks side by side, by name, in running order."""
    names = [[str(d["name"]) for d in side] for side in (before, after)]
    rows: list[Row] = []
    matcher = difflib.SequenceMatcher(None, *names, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            rows += [Row(x, y) for x, y in zip(before[a:b], after[c:d], strict=True)]
        else:
            rows += [Row(before=x) for x in before[a:b]]
            rows += [Row(after=y) for y in after[c:d]]
    return rows


def shortened(rows: Sequence[Row]) -> list[Row]:
    """Changed rows and their neighbours; each run of others is one row that counts them."""
    near = {i + k for i, row in enumerate(rows) if row.changed for k in range(-AROUND, AROUND + 1)}
    found: list[Row] = []
    skipped = 0
    for i, row in enumerate(rows):
        if i in near:
            if skipped:
                found.append(Row(left_out=skipped))
            found.append(row)
            skipped = 0
        else:
            skipped += 1
    return [*found, Row(left_out=skipped)] if skipped else found


def network_svg(rows: Sequence[Row], said: str) -> str:
    """Two columns of boxes from the input down to the output."""
    shown = shortened(rows)
    height = ROW * (len(shown) + 1)
    drawn = [
        f'<text x="{x}" y="16" font-weight="bold">{word}</text>'
        for x, word in ((LEFT, "as it is"), (RIGHT, "rewritten"))
    ]
    for column, x in (("before", LEFT), ("after", RIGHT)):
        present = [i for i, r in enumerate(shown) if r.left_out or getattr(r, column) is not None]
        for i, j in itertools.pairwise(present):
            top, bottom = ROW * (i + 1) + BOX - 4, ROW * (j + 1) - 4
            middle = x + COLUMN / 2
            drawn.append(
                f'<line class="axis" x1="{middle}" y1="{top}" x2="{middle}" y2="{bottom}"/>'
            )
        drawn += [_box(shown[i], column, x, ROW * (i + 1) - 4) for i in present]
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" aria-label="{escape(said)}; '
        f'listed in the table below">{"".join(drawn)}</svg>'
    )


def _box(row: Row, column: str, x: float, y: float) -> str:
    if row.left_out:
        word = f"{row.left_out} unchanged layers" if row.left_out > 1 else "1 unchanged layer"
        return f'<text class="quiet" x="{x + COLUMN / 2}" y="{y + 18}" text-anchor="middle">{word}</text>'
    entry = row.before if column == "before" else row.after
    assert entry is not None
    fill, stroke = "--box", "--line"
    if row.changed:
        if column == "before":
            fill, stroke = ("--gonebox", "--gone") if row.after is None else ("--box", "--soft")
        else:
            in_float = row.changed == "left in float"
            fill, stroke = ("--floatbox", "--ref") if in_float else ("--newbox", "--new")
    text = _named(entry)
    made = ""
    if column == "after" and row.changed:
        made = (
            "left in float"
            if row.changed == "left in float"
            else entry["made_by"].partition("@")[0]
        )
    text = _cut(text, LONGEST - len(made))
    note = f'<tspan font-style="italic"> {escape(made)}</tspan>' if made else ""
    return (
        f"<g><title>{escape(_named(entry))} {escape(row.changed)}</title>"
        f'<rect x="{x}" y="{y}" width="{COLUMN}" height="{BOX}" rx="5" style="fill: var({fill}); '
        f'stroke: var({stroke})"/><text x="{x + 10}" y="{y + 17}">{escape(text)}{note}</text></g>'
    )


def _named(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    size = f" {entry['size']}" if entry["size"] else ""
    return f"{entry['layer'] or entry['name']}: {entry['kind']}{size}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"
