"""One-line faults planted in the code, each run against its own test files: which of them nobody notices?

    python -m benchmarks.mutants                    # all of them
    python -m benchmarks.mutants racing refine      # those whose name holds one of these words
    python -m benchmarks.mutants --slow             # slow tests too

A mutant is killed when a test of its files fails. One that survives is a line that no test holds, or
a line that is not needed. The tree is copied to a temporary folder; nothing is changed here. The
libraries are imported once, and each mutant runs in a forked process, on a fresh import of the code.

Source: DeMillo, Lipton and Sayward 1978, Hints on Test Data Selection.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("rewriter", "search", "tests", "configs", "docs", "benchmarks", "results")
FILES = ("pyproject.toml", "README.md", "Makefile", "CONTRIBUTING.md")
LIBRARIES = [
    "numpy", "torch", "torch.fx", "torchvision", "onnx", "onnxruntime", "optuna", "pydantic", "timm",
    "sklearn.datasets", "safetensors.torch", "scipy", "typer", "rich", "yaml", "torchmetrics",
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in ``file``; ``tests`` are to notice it. ``old`` occurs once."""

    file: str
    old: str
    new: str
    tests: str

    @property
    def name(self) -> str:
        return f"{self.file}: {self.old.strip()} -> {self.new.strip()}"


MUTANTS = [
    Mutant(**row) for row in yaml.safe_load((ROOT / "benchmarks/data/mutants.yaml").read_text())
]


def copy_of_the_tree(folder: Path) -> None:
    """The files that tests read, in a folder of their own."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)


def passes(folder: Path, tests: Sequence[str], slow: bool) -> bool:
    """Whether tests of the copied tree pass, in a forked process."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(nowhere, stream)
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider"] + (["-m", ""] if slow else [])
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of the libraries
            code = int(pytest.main([*options, *tests]))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code > 1:
        raise RuntimeError(f"{' '.join(tests)}: pytest ended with {code}")
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutants whose name holds one of these")
    parser.add_argument("--slow", action="store_true", help="run slow tests too")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(w in m.name for w in options.words)]
    for library in LIBRARIES:
        importlib.import_module(library)
    sys.dont_write_bytecode = True
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    for mutant in chosen:
        if (found := (ROOT / mutant.file).read_text().count(mutant.old)) != 1:
            parser.error(f"{mutant.name}: occurs {found} times")
    survived: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "tree")
        copy_of_the_tree(folder)
        for i, mutant in enumerate(chosen):
            path = folder / mutant.file
            text, start = path.read_text(), time.perf_counter()
            path.write_text(text.replace(mutant.old, mutant.new))
            alive = passes(folder, mutant.tests.split(), options.slow)
            path.write_text(text)
            if alive:
                survived.append(mutant.name)
            said = "SURVIVED" if alive else "killed"
            print(
                f"{i + 1}/{len(chosen)} {said} {time.perf_counter() - start:.0f} s  {mutant.name}",
                flush=True,
            )
        unchanged = sorted({test for m in chosen for test in m.tests.split()})
        if not passes(folder, unchanged, options.slow):
            print("the tests fail without any mutant: the numbers above mean nothing")
            return 2
    print(f"{len(chosen) - len(survived)} of {len(chosen)} killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
