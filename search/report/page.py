"""The frame of the HTML report: style, script, tables, sections with an index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from search.report.rows import InWords

ASSETS = Path(__file__).with_name("assets")

TEXT_COLUMNS = (
    "engine",
    "kind",
    "causes",
    "answers",
    "error",
    "traceback",
    "after",
    "what happened",
    "classes and scores",
    "measured",
    "kept",
    "adds",
    "plan",
    "what it does",
    "",
)


@dataclass(frozen=True)
class Section:
    """One part of the page; without a body it is left out."""

    key: str
    title: str
    body: str
    folded: bool = False


def page(title: str, first: str, sections: Sequence[Section]) -> str:
    """A whole page, which needs nothing but itself.

    Args:
        title: As text.
        first: HTML of the first screen.
        sections: Below it, in order.
    """
    shown = [s for s in sections if s.body]
    index = "".join(f'<a href="#{s.key}">{escape(s.title)}</a> ' for s in shown)
    body = "".join(map(_section, shown))
    style, script = ((ASSETS / n).read_text(encoding="utf-8") for n in ("report.css", "report.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{style}</style></head>\n<body>\n'
        '<a class="skip" href="#content">To the content</a>'
        f"<header><h1>{escape(title)}</h1>\n"
        f'<nav aria-label="Sections" class="small">{index}</nav></header>\n'
        f'<main id="content">\n{first}\n{body}</main>\n<script>{script}</script></body></html>\n'
    )


def _section(section: Section) -> str:
    key, title = section.key, escape(section.title)
    if section.folded:
        return (
            f'<section id="{key}" aria-labelledby="{key}-title"><details><summary><h2 id="{key}-title">{title}</h2>'
            f"</summary>\n{section.body}</details></section>\n"
        )
    return (
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>\n'
        f"{section.body}\n</section>\n"
    )


def drawing(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def table(names: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table; its first column names the row."""
    kinds = [' class="text"' if n in TEXT_COLUMNS else "" for n in names]
    head = "".join(
        f'<th scope="col"{k}>{escape(n) or "mark"}</th>' for n, k in zip(names, kinds, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(_cell(c, k) for c, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{escape(caption or "Table")}">'
        f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, body: str) -> str:
    """Something that is opened on demand, and printed in any case."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def listed(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def paragraph(text: str) -> str:
    return f'<p class="soft small">{escape(text)}</p>'


def _cell(text: str, kind: str) -> str:
    """A plan in words has its exact text one click away."""
    if isinstance(text, InWords) and text.exact:
        exact = f"<code>{escape(text.exact)}</code>"
        return f'<td class="text"><details><summary>{escape(text)}</summary>{exact}</details></td>'
    return f"<td{kind}>{escape(text)}</td>"
