"""The rules' pages are what docs/rule_pages.py makes of their docstrings today."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rule_pages", ROOT / "docs" / "rule_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_rule_has_its_page_and_no_page_is_left_over(pages: ModuleType) -> None:
    made = {file: pages.page(file, rules) for file, rules in pages.rules_by_file().items()}
    found = {path.stem: path.read_text() for path in pages.PAGES.glob("*.md")}
    assert found.keys() == made.keys(), "run: python docs/rule_pages.py"
    for file, text in made.items():
        assert found[file] == text, f"{file}: run: python docs/rule_pages.py"


def test_the_overview_lists_every_rule(pages: ModuleType) -> None:
    assert pages.OVERVIEW.read_text() == pages.overview(), "run: python docs/rule_pages.py"
    for rules in pages.rules_by_file().values():
        assert all(f"[`{rule.name}`]" in pages.overview() for rule in rules)


def test_a_docstring_is_taken_apart(pages: ModuleType) -> None:
    text = "Do it.\n\nBefore: a\nAfter:  b\n        c\n\n    a = b\n\nMore.\n\nWhy: w\n    x\nExact: yes.\nCost: none."
    found = pages.sections(text)
    assert found["After"] == "After:  b\n        c"
    assert found["Why"] == "W\n    x"
    assert "a = b" in found["text"] and "More." in found["text"]
    assert "Source" not in found
    with pytest.raises(ValueError, match=r"Do it.: its docstring lacks Cost"):
        pages.sections(text.replace("Cost", "Costs"))
