"""The network before and after, layer by layer, with what changed marked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

from search.pareto.plan_summary import Places, plan_summary
from search.report.graph import jumps, network_graph
from search.report.network_rows import Row, aligned, named, shortened
from search.report.page import Section, drawing, folded, paragraph, table

if TYPE_CHECKING:
    from search.sensitivity.run import Sensitivity

HARMFUL = 5  # layers that are marked with their cause
WIDTH, ROW, BOX = 980, 34, 26
COLUMN, LEFT, RIGHT = 460, 4, 516
LONGEST = 70


def network_section(
    exhibits: Mapping[str, Any] | None,
    sensitivity: Sensitivity | None = None,
    places: Places | None = None,
) -> Section:
    """The graph to pan over, on paper what changed of it, its table, and the steps that act everywhere."""
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
    damage = {} if sensitivity is None else sensitivity.damage_by_node()
    changes = {s: plan_summary(s, places) for s in plan.split()}
    links = "".join(
        f'<button type="button" data-jump="{escape(node)}">{escape(name)}</button>'
        for node, name in jumps(rows)
    )
    parts.append(
        f'<div class="tools"><button type="button" data-zoom="0.7" aria-label="smaller">\u2212</button>'
        f'<button type="button" data-zoom="1.43" aria-label="larger">+</button>{links}</div>'
        f"{network_graph(rows, damage, changes, said)}"
        f'<p class="soft small key"><span class="swatch heat"></span>damage of the layer alone in int8 '
        f'<span class="swatch new"></span>new or changed <span class="swatch gone"></span>replaced '
        f'<span class="swatch kept-float"></span>left in float. Drag or scroll; a click shows the ranges of a layer.</p>'
    )
    if changed or harmful:
        caption = f"Left: as it is. Right: rewritten. {said}. Runs of other layers are left out."
        parts.append(f'<div class="paper">{drawing(network_svg(rows, said), caption)}</div>')
        listed = [
            [named(r.before), named(r.after), r.changed, r.harm]
            for r in rows
            if r.changed or r.harm
        ]
        listing = table(["before", "after", "what happened", "causes"], listed)
        parts.append(folded("What changed, as a table", listing))
    return Section("network", title, "".join(parts))


def _everywhere(plan: str) -> str:
    whole = [s for s in plan.split() if s.endswith("@model")]
    if not plan:
        return "Nothing is to be changed: the best plan is the empty one."
    if not whole:
        return "Every step of the plan acts at one place."
    return (
        f"Throughout the network, without a change of its layers: {plan_summary(' '.join(whole))}. "
        "They act on weights, biases and ranges only."
    )


def _harmful(sensitivity: Sensitivity) -> dict[str, str]:
    """What is wrong with the first layers of the ranking, and with values that no layer reads, by node name."""
    worst = [d for d in sensitivity.layers[:HARMFUL] if sensitivity.counts(d.damage)]
    said = {
        d.node: f"{i}. {d.causes[0] if d.causes else 'harmful'}" for i, d in enumerate(worst, 1)
    }
    return said | {v.value: "its one range hurts" for v in sensitivity.uncharged()}


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
    text = named(entry)
    text = _cut(text, LONGEST - len(note))
    marked = f'<tspan font-style="italic"> {escape(note)}</tspan>' if note else ""
    return (
        f"<g><title>{escape(' '.join((named(entry), row.harm, row.changed)).strip())}</title>"
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


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"
