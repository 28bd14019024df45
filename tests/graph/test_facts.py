"""What is kept in ``meta`` is touched through its facts alone, by the packages that each fact declares."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rewriter.graph import facts
from rewriter.graph.facts import FACTS, Fact

ROOT = Path(__file__).resolve().parents[2]
FILES = [p for folder in ("rewriter", "search", "quantfix") for p in (ROOT / folder).rglob("*.py")]
NAMES = {name: f for name, f in vars(facts).items() if isinstance(f, Fact)}
WRITES, READS = {"put", "drop"}, {"of", "get", "known"}


def package(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "rewriter" else parts[0]


@functools.cache
def used() -> dict[str, tuple[set[str], set[str]]]:
    """By the name of a fact, the packages that write and that read it."""
    found: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value).removeprefix("facts.")
                if owner in NAMES and node.func.attr in WRITES | READS:
                    found[owner][node.func.attr in READS].add(package(path))
    return found


def test_meta_is_touched_nowhere_else() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if path.name != "facts.py" or path.parent.name != "graph"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "meta"
    ]
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_packages_write_and_read_what_they_are_declared_to(name: str) -> None:
    writers, readers = used()[name]
    # a fact whose key is computed ("influence" and its like) may be written by more than is seen
    assert writers <= set(NAMES[name].writers), f"writers: {sorted(writers)}"
    assert readers <= set(NAMES[name].readers), f"readers: {sorted(readers)}"
    assert set(NAMES[name].readers) <= readers | {"assemble"}, f"readers: {sorted(readers)}"


def test_keys_are_unique_and_found() -> None:
    assert len({f.key for f in FACTS}) == len(FACTS) == len(NAMES)
    assert all(facts.named(f.key) is f for f in FACTS)


def test_what_is_put_is_known_until_it_is_dropped() -> None:
    owner: Any = SimpleNamespace(meta={})
    assert not facts.SHAPE.known(owner)
    assert facts.SHAPE.get(owner) is None
    assert facts.SHAPE.get(owner, ()) == ()
    facts.SHAPE.put(owner, (1, 3))
    assert facts.SHAPE.of(owner) == facts.SHAPE.get(owner) == (1, 3)
    other: Any = SimpleNamespace(meta={"dtype": 1})
    facts.keep(other, owner, facts.SHAPE, facts.LAYER)
    assert other.meta == {"dtype": 1, "shape": (1, 3)}
    facts.inherit(owner, other, facts.DTYPE)
    assert owner.meta == {"shape": (1, 3)}
    facts.SHAPE.drop(owner)
    facts.SHAPE.drop(owner)
    assert not facts.SHAPE.known(owner)
