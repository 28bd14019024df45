"""Layers of a network before and after a plan, side by side."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

AROUND = 1  # unchanged layers that are shown beside a changed one


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


def named(entry: Mapping[str, Any] | None) -> str:
    """A layer with its kind and size; nothing for none."""
    if entry is None:
        return ""
    size = f" {entry['size']}" if entry["size"] else ""
    return f"{entry['layer'] or entry['name']}: {entry['kind']}{size}"
