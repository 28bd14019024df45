"""The network before and after, layer by layer, with what changed marked."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

from search.report.page import Section, drawing, folded, paragraph, table

if TYPE_CHECKING:
    from search.sensitivity.run import Sensitivity

HARMFUL = 5  # layers that are marked with their cause
WIDTH, ROW, BOX = 980, 34, 26
COLUMN, LEFT, RIGHT = 460, 4, 516
AROUND = 1  # unchanged layers that are shown beside a changed one
LONGEST = 70


@dataclass(frozen=True)
class Row:
    """One line of the picture: the layer before and after, either of them None; or so many left out.

    ``harm`` is the rank and the cause of a harmful layer.
    """

    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    left_out: int = 0
    harm: str = ""

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


def network_section(
    exhibits: Mapping[str, Any] | None, sensitivity: Sensitivity | None = None
) -> Section:
    """The picture with the harmful layers and what changed, its table, and the steps that act everywhere."""
    title = "The network before and after"
    if exhibits is None:
        return Section("network", title, "")
    plan = str(exhibits["plan"])
    rows = aligned(exhibits["before"], exhibits["after"])
    harmful = {} if sensitivity is None else _harmful(sensitivity)
    rows = [replace(r, harm=harmful.get(str((r.before or {}).get("name")), "")) for r in rows]
    changed = [r for r in rows if r.changed]
    said = f"{len(changed)} of {len(rows)} layers are new, replaced, changed or left in float"
    parts = [paragraph(_everywhere(plan))]
    if not changed and plan:
        parts.append(paragraph("No layer is added, replaced or left in float by this plan."))
    if changed or harmful:
        caption = (
            f"Left: as it is, the most harmful layers and values with their cause. Right: rewritten. {said}; green: new or "
            "changed, red: replaced, amber: left in float. Runs of other layers are left out."
        )
        parts.append(drawing(network_svg(rows, said), caption))
        named = [
            [_named(r.before), _named(r.after), r.changed, r.harm]
            for r in rows
            if r.changed or r.harm
        ]
        listing = table(["before", "after", "what happened", "causes"], named)
        parts.append(folded("The picture as a table", listing))
    return Section("network", title, "".join(parts))


def _everywhere(plan: str) -> str:
    whole = [s.partition("@")[0] for s in plan.split() if s.endswith("@model")]
    if not plan:
        return "Nothing is to be changed: the best plan is the empty one."
    if not whole:
        return "Every step of the plan acts at one place."
    return (
        f"Throughout the network, without a change of its layers: {', '.join(whole)}. "
        "They act on weights, biases and ranges only."
    )


def _harmful(sensitivity: Sensitivity) -> dict[str, str]:
    """What is wrong with the first layers of the ranking, and with values that no layer reads, by node name."""
    worst = [d for d in sensitivity.layers[:HARMFUL] if sensitivity.counts(d.damage)]
    said = {
        d.node: f"{i}. {d.causes[0] if d.causes else 'harmful'}" for i, d in enumerate(worst, 1)
    }
    return said | {v.value: "its one range hurts" for v in sensitivity.uncharged()}


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
    """Changed rows and their neighbors; each run of others is one row that counts them."""
    near = {
        i + k
        for i, row in enumerate(rows)
        if row.changed or row.harm
        for k in range(-AROUND, AROUND + 1)
    }
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
        f'<svg viewBox="0 0 {WIDTH} {height}" width="100%" role="img" aria-label="{escape(said)}; '
        f'listed in the table below">{"".join(drawn)}</svg>'
    )


def _box(row: Row, column: str, x: float, y: float) -> str:
    if row.left_out:
        word = f"{row.left_out} other layers" if row.left_out > 1 else "1 other layer"
        return f'<text class="quiet" x="{x + COLUMN / 2}" y="{y + 18}" text-anchor="middle">{word}</text>'
    entry = row.before if column == "before" else row.after
    assert entry is not None
    fill, stroke, note = _look(row, column)
    text = _named(entry)
    text = _cut(text, LONGEST - len(note))
    marked = f'<tspan font-style="italic"> {escape(note)}</tspan>' if note else ""
    return (
        f"<g><title>{escape(' '.join((_named(entry), row.harm, row.changed)).strip())}</title>"
        f'<rect x="{x}" y="{y}" width="{COLUMN}" height="{BOX}" rx="5" style="fill: var({fill}); '
        f'stroke: var({stroke})"/><text x="{x + 10}" y="{y + 17}">{escape(text)}{marked}</text></g>'
    )


def _look(row: Row, column: str) -> tuple[str, str, str]:
    """Fill, outline and note of a layer's box."""
    if column == "before":
        if row.changed and row.after is None:
            return "--gonebox", "--gone", row.harm
        return "--box", "--gone" if row.harm else "--line", row.harm
    if not row.changed:
        return "--box", "--line", ""
    if row.changed == "left in float":
        return "--floatbox", "--ref", row.changed
    made = "" if row.after is None else str(row.after["made_by"]).partition("@")[0]
    return "--newbox", "--new", made


def _named(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    size = f" {entry['size']}" if entry["size"] else ""
    return f"{entry['layer'] or entry['name']}: {entry['kind']}{size}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"
