"""Tables of documents from the records in ``results/``.

    python -m benchmarks.tables           # rewrites the tables
    python -m benchmarks.tables --check   # exit 1 where one is not what the records say

A document marks the place with ``<!-- table: KIND [NAME] -->`` and ``<!-- end of table -->``; what stands between is made here.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.record import ROOT, Record, Row, records

PLACE = re.compile(
    r"(<!-- table: (?P<kind>\w+) ?(?P<name>[\w/]*) -->\n)(?P<old>.*?)(<!-- end of table -->)", re.S
)
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def overview(name: str) -> list[str]:
    """One row for each record."""
    del name
    rows = [
        [
            r.network,
            r.target,
            r.metric,
            str(r.samples),
            _percent(r.baseline.float_),
            _percent(r.baseline.int8),
            "" if r.chosen is None else _bounded(r.chosen),
            _change(r.baseline.damage, None if r.chosen is None else r.chosen.damage),
            "" if r.chosen is None else f"{100 * r.chosen.macs_ratio:.1f} %",
        ]
        for r in records().values()
    ]
    names = [
        "network",
        "target",
        "metric",
        "samples",
        "float",
        "plain int8",
        "chosen",
        "damage",
        "MACs",
    ]
    return _table(names, rows)


def named(name: str) -> list[str]:
    """The named rows of one record, absolute and relative to float = 100, then what was chosen."""
    record = records()[name]
    level = record.baseline.float_ or 1.0
    rows = [["float", _percent(level), "100.0", "0", "100.0 %"]]
    rows += [_row(r, level) for r in record.rows]
    if record.chosen is not None and record.chosen.plan:
        rows.append(_row(record.chosen, level))
    return _table([record.target, record.metric, "relative", "damage", "MACs"], rows)


def front(name: str) -> list[str]:
    """The front of one record, cheapest first, and its controls."""
    record = records()[name]
    points = [Row.model_validate({"name": "", **p}) for p in record.points]
    rows = [
        [
            p.summary,
            _bounded(p),
            "" if p.damage is None else f"{p.damage:.3g}",
            f"{100 * p.macs_ratio:.1f} %",
        ]
        for p in points
    ]
    rows += [
        [
            f"control: {c['how']}",
            _percent(c["int8"]),
            f"{c['damage']:.3g}",
            f"{100 * c['macs_ratio']:.1f} %",
        ]
        for c in record.control
    ]
    return _table(["plan", record.metric, "damage", "MACs"], rows)


KINDS: dict[str, Callable[[str], list[str]]] = {
    "overview": overview,
    "named": named,
    "front": front,
}


def filled(text: str) -> str:
    """A document with its tables as the records have them."""

    def made(found: re.Match[str]) -> str:
        return f"{found[1]}{chr(10).join(KINDS[found['kind']](found['name']))}\n{found[5]}"

    return PLACE.sub(made, text)


def figures(record: Record) -> list[float]:
    """Every number of a record that a document may quote, fractions as percent too."""
    found: list[float] = [float(record.samples)]
    level = record.baseline.float_
    rows = [record.baseline, *record.rows, *([record.chosen] if record.chosen else [])]
    rows += [Row.model_validate({"name": "", **p}) for p in record.points]
    for row in rows:
        for value in (row.float_, row.int8, *(row.int8_interval or ())):
            if value is not None:
                found += [value, 100 * value]
        if row.int8 is not None and level:
            found += [
                100 * row.int8 / level,
                100 * (level - row.int8),
                100 * (row.int8 - (record.baseline.int8 or 0)),
            ]
        found += [] if row.damage is None else [row.damage]
        if isinstance(row, Row):
            found += [100 * row.macs_ratio, 100 * (row.macs_ratio - 1), row.macs / 1e6]
    for control in record.control:
        found += [
            100 * (control["int8"] or 0),
            control["damage"] or 0,
            100 * control["macs_ratio"],
        ]
    return [*found, 100.0]


def _row(row: Row, level: float) -> list[str]:
    relative = "" if row.int8 is None else f"{100 * row.int8 / level:.1f}"
    damage = "" if row.damage is None else f"{row.damage:.3g}"
    name = f"chosen: {row.summary}" if row.name == "chosen" else row.name
    return [name, _bounded(row), relative, damage, f"{100 * row.macs_ratio:.1f} %"]


def _bounded(row: Row) -> str:
    if row.int8 is None:
        return ""
    bounds = row.int8_interval
    return _percent(row.int8) + (
        "" if bounds is None else f" [{100 * bounds[0]:.2f}, {100 * bounds[1]:.2f}]"
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _change(before: float | None, after: float | None) -> str:
    return " \u2192 ".join("" if v is None else f"{v:.3g}" for v in (before, after))


def _table(names: list[str], rows: list[list[str]]) -> list[str]:
    lines = [names, ["---"] * len(names), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale: list[Path] = []
    for path in DOCUMENTS:
        text = path.read_text()
        made = filled(text)
        if made != text:
            stale.append(path)
            if not options.check:
                path.write_text(made)
    for path in stale:
        print(path.relative_to(ROOT))
    sys.exit(1 if stale and options.check else 0)


if __name__ == "__main__":
    main()
