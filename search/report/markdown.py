"""The run as short Markdown, for a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from search.pareto.step_effects import step_effects
from search.report.cards import effect_rows
from search.report.facts import commands, measured
from search.report.rows import front_rows, layer_rows
from search.report.verdict import advice
from search.results import Results

LAYERS = 5


def markdown_report(results: Results) -> str:
    """What to do, the front, the steps of the best plan, the worst layers, and how it was measured."""
    title = f"{Path(str(results.facts['config'])).stem} in int8 on {results.facts['target']}"
    lines = [f"# {title}", "", _safe(advice(results)), "", "## Front", ""]
    lines += _table(*front_rows(results))
    best = results.best() if results.front.points else None
    if best is not None and best.plan:
        lines += [
            "",
            "## Steps of the best plan",
            "",
            *_table(*effect_rows(results, step_effects(best.plan, results.scores))),
        ]
    if results.sensitivity is not None and results.sensitivity.layers:
        lines += [
            "",
            "## Most harmful layers",
            "",
            *_table(*layer_rows(results.sensitivity, LAYERS)),
        ]
    lines += ["", "<details><summary>How it was measured</summary>", ""]
    lines += [f"- {_safe(said)}" for said in measured(results)]
    lines += ["", "```sh", *commands(results), "```", "", "</details>", ""]
    return "\n".join(lines)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    wanted = [i for i, n in enumerate(names) if n == "" or any(row[i] for row in rows)]
    found = [
        [names[i] for i in wanted],
        ["---" for _ in wanted],
        *[[row[i] for i in wanted] for row in rows],
    ]
    return ["| " + " | ".join(_safe(cell) for cell in row) + " |" for row in found]


def _safe(text: str) -> str:
    """Text that Markdown shows as it is; steps as code, so that no name in them is taken for a mark or a person."""
    spans = re.split(r'"([^"]*@[^"]*)"', text)
    if len(spans) == 1 and "@" in text:
        return f"`{text}`".replace("|", "\\|")
    shown: list[str] = []
    for i, span in enumerate(spans):
        if i % 2:
            shown.append(f"`{span}`".replace("|", "\\|"))
            continue
        for mark in ("\\", "|", "_", "*", "`", "<", "["):
            span = span.replace(mark, f"\\{mark}")
        shown.append(span)
    return "".join(shown)
