"""Make the pages of the rules, docs/rules/NAME.md, and the table in docs/rules.md from docstrings.

    python docs/rule_pages.py

A rule's module docstring is its documentation. It has, in this order: one line; ``Before:`` and
``After:``; the formula, indented; what else there is to say; ``Why:``, ``Exact:``, ``Cost:``, and
``Source:`` where there is one. ``tests/test_rule_pages.py`` holds the pages up to date.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rewriter.rules import RULES, RewriteRule  # noqa: E402

PAGES = ROOT / "docs" / "rules"
OVERVIEW = ROOT / "docs" / "rules.md"
TABLE = re.compile(r"(?<=<!-- table of rules -->\n).*(?=<!-- end -->)", re.DOTALL)
SECTIONS = {
    "Why": "Why int8 needs it",
    "Exact": "Is it exact",
    "Cost": "What it costs",
    "Source": "Source",
}
REQUIRED = ("Before", "After", "Why", "Exact", "Cost")


def rules_by_file() -> dict[str, list[RewriteRule]]:
    """The rules of each file of rewriter/rules, in the catalogue's order."""
    found: dict[str, list[RewriteRule]] = {}
    for rule in RULES:
        found.setdefault(type(rule).__module__.rsplit(".", 1)[1], []).append(rule)
    return found


def docstring_of(rule: RewriteRule) -> str:
    """The docstring of the module that a rule is written in."""
    return inspect.cleandoc(str(sys.modules[type(rule).__module__].__doc__))


def sections(text: str) -> dict[str, str]:
    """The parts of a rule's docstring by name; "title" and "text" have none in the docstring.

    A named part ends where the next one begins, or, for those after the formula, at a blank line.
    """
    found = {"title": text.partition("\n")[0], "text": ""}
    for block in re.split(r"\n\s*\n", text.partition("\n")[2].strip("\n")):
        for part in re.split(rf"\n(?=(?:Before|After|{'|'.join(SECTIONS)}):)", block):
            name, colon, rest = part.partition(":")
            if colon and name in (*REQUIRED, *SECTIONS):
                found[name] = _sentence(rest) if name in SECTIONS else part.rstrip()
            else:
                found["text"] += part.rstrip() + "\n\n"
    missing = [name for name in REQUIRED if not found.get(name)]
    if missing:
        raise ValueError(f"{found['title']}: its docstring lacks {', '.join(missing)}")
    return found


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


def markdown(text: str) -> str:
    """Prose of a docstring in Markdown: code in single backticks, paragraphs without indents."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.splitlines()
        if lines and all(line.startswith("    ") for line in lines):
            blocks.append("```text\n" + inspect.cleandoc("\n" + block) + "\n```")
        else:
            blocks.append("\n".join(line.strip() for line in lines).replace("``", "`"))
    return "\n\n".join(blocks)


def page(file: str, rules: Sequence[RewriteRule]) -> str:
    """The page of one file of rules."""
    parts = sections(docstring_of(rules[0]))
    drawn = f"{parts['Before']}\n{parts['After']}"
    lines = [
        f"<!-- made by docs/rule_pages.py from rewriter/rules/{file}.py; edit that file -->",
        f"# {file}",
        markdown(parts["title"]),
        f"In a plan: {', '.join(f'`{rule.name}`' for rule in rules)}.",
        "## What it does",
        f"```text\n{drawn}\n```",
        markdown(parts["text"]),
    ]
    for name, heading in SECTIONS.items():
        if parts.get(name):
            lines += [f"## {heading}", markdown(parts[name])]
    return "\n\n".join(line for line in lines if line) + "\n"


def table() -> str:
    """The table of all rules in docs/rules.md."""
    rows = ["| rule | contract | MACs | what it does |", "|---|---|---|---|"]
    for file, rules in rules_by_file().items():
        names = ", ".join(f"[`{rule.name}`](rules/{file}.md)" for rule in rules)
        contracts = ", ".join(dict.fromkeys(rule.contract for rule in rules))
        saves = any(getattr(rule, "saves", False) for rule in rules)
        macs = "none" if all(rule.free for rule in rules) else "fewer" if saves else "more"
        title = markdown(sections(docstring_of(rules[0]))["title"]).rstrip(".")
        rows.append(f"| {names} | {contracts} | {macs} | {title} |")
    return "\n".join(rows) + "\n"


def overview() -> str:
    """docs/rules.md with the table as it has to be."""
    return TABLE.sub(lambda found: table(), OVERVIEW.read_text())


def main() -> None:
    PAGES.mkdir(exist_ok=True)
    for file, rules in rules_by_file().items():
        (PAGES / f"{file}.md").write_text(page(file, rules))
    OVERVIEW.write_text(overview())


if __name__ == "__main__":
    main()
