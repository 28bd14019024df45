"""docs/errors.md against the tables of bad inputs: every message has its row, every row is said somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.search import test_bad_files, test_bad_input, test_bad_run
from tests.search.refused import Bad

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
CASES = [
    bad
    for module in (test_bad_input, test_bad_files, test_bad_run)
    for table in vars(module).values()
    if isinstance(table, list) and table and isinstance(table[0], Bad)
    for bad in table
]
ROWS = re.findall(r"^\| `(.+?)` \|", DOCUMENT.read_text(), re.MULTILINE)


def fits(row: str, bad: Bad) -> bool:
    """Whether the fixed parts of a row stand in a message, in that order."""
    parts = (re.escape(part.strip()) for part in row.split("..."))
    return re.search(".*".join(parts), " ... ".join(bad.said)) is not None


def test_every_message_has_a_row() -> None:
    without = [(bad.name, bad.said) for bad in CASES if not any(fits(row, bad) for row in ROWS)]
    assert not without


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_said_somewhere(row: str) -> None:
    assert any(fits(row, bad) for bad in CASES)


def test_a_row_without_fixed_words_would_fit_everything() -> None:
    assert len(CASES) > 150
    for row in ROWS:
        fitting = sum(fits(row, bad) for bad in CASES)
        assert fitting < 25, f"{row} fits {fitting} messages"
