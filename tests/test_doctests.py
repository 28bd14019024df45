"""The examples in docstrings, and those on the page for notebooks."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from search.config.schema import load_config
from search.job import open_job
from search.run import note_run, run_search, sensitivity_of
from tests.test_documents import blocks, smaller

ROOT = Path(__file__).resolve().parents[1]
FLAGS = doctest.ELLIPSIS
FILES = sorted(
    p for folder in ("quantfix", "rewriter", "search") for p in (ROOT / folder).rglob("*.py")
)
WITH_EXAMPLES = [
    ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for p in FILES
    if re.search(r"^\s*>>> ", p.read_text(), re.M)
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert found.attempted > 0
    assert found.failed == 0


def test_there_are_examples() -> None:
    assert {"rewriter.plan", "rewriter.graph.cost", "search.pareto.step_effects"} <= set(
        WITH_EXAMPLES
    )


@pytest.mark.slow
def test_the_page_for_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "notebook.md"
    for block in blocks(ROOT / "docs" / "tutorial-own-model.md"):
        if block.name in ("mymodel.py", "mine.yaml"):
            (tmp_path / block.name).write_text(smaller(block.text))
    monkeypatch.chdir(tmp_path)
    job = open_job(load_config(tmp_path / "mine.yaml"), tmp_path / "runs" / "mine", threads=1)
    sensitivity = sensitivity_of(job)
    note_run(job)
    run_search(job, sensitivity)
    examples = "\n".join(b.text for b in blocks(page) if b.language == "python")
    test = doctest.DocTestParser().get_doctest(examples, {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test)
    assert runner.tries > 30
    assert runner.failures == 0


@pytest.mark.slow
def test_the_page_on_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "python.md"
    monkeypatch.chdir(tmp_path)
    examples = "\n".join(b.text for b in blocks(page) if b.language == "python")
    test = doctest.DocTestParser().get_doctest(examples, {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test)
    assert runner.tries > 25
    assert runner.failures == 0
