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


STRATEGY = "tests/search/strategy"
MUTANTS = [
    # the eleven that once survived
    Mutant(
        "rewriter/repair/bias_and_rounding.py",
        "return (bias if axis is not None else bias.amax()) / (step * 2.0**30)",
        "return 0 * (bias if axis is not None else bias.amax()) / (step * 2.0**30)",
        "tests/repair/test_bias_and_rounding.py",
    ),
    Mutant(
        "rewriter/int8/qat.py",
        "return ((bias if scale.ndim else bias.amax()) / (step * 2.0**30)).float()",
        "return 0 * ((bias if scale.ndim else bias.amax()) / (step * 2.0**30)).float()",
        "tests/int8/test_qat.py",
    ),
    Mutant(
        "rewriter/surgery/channel_component.py",
        "return places[0] / places[1]",
        "return 1.0",
        "tests/surgery/test_channel_component.py",
    ),
    Mutant(
        "rewriter/surgery/channel_component.py",
        "if whole < summed:",
        "if False:",
        "tests/surgery/test_channel_component.py",
    ),
    Mutant(
        "rewriter/ladder.py",
        "\nSPLIT_PLACES = 4",
        "\nSPLIT_PLACES = 400",
        "tests/test_ladder_splits.py",
    ),
    Mutant(
        "rewriter/ladder.py",
        "\nSPLIT_DAMAGE_SHARE = 0.1",
        "\nSPLIT_DAMAGE_SHARE = 0.0",
        "tests/test_ladder_splits.py",
    ),
    Mutant(
        "rewriter/rules/split_head.py",
        "\nLEAST_GAIN = 0.1",
        "\nLEAST_GAIN = 0.0",
        "tests/rules/test_split_head.py",
    ),
    # grouping of channels
    Mutant(
        "rewriter/surgery/group_channels.py",
        "argsort(descending=True)[:ORDERS]",
        "argsort(descending=True)[:0]",
        "tests/surgery/test_group_channels.py",
    ),
    Mutant(
        "rewriter/surgery/group_channels.py",
        "\nPLACES = 1024",
        "\nPLACES = 4",
        "tests/surgery/test_group_channels.py",
    ),
    Mutant(
        "rewriter/surgery/group_channels.py",
        "return total / max(alone, 1e-300)",
        "return total",
        "tests/surgery/test_group_channels.py tests/rules/test_split_head.py",
    ),
    Mutant(
        "rewriter/surgery/group_channels.py",
        "size = width(low, high).square().mean(1, keepdim=True)",
        "size = width(low, high).square().amax(1, keepdim=True)",
        "tests/surgery/test_group_channels.py",
    ),
    # components and joined groups
    Mutant(
        "rewriter/surgery/channel_component.py",
        "found[value] += gain / _power(reader)",
        "found[value] += gain",
        "tests/surgery/test_channel_component.py tests/rules/test_split_range.py",
    ),
    Mutant(
        "rewriter/surgery/channel_component.py",
        ".square().sum((1, 2, 3))",
        ".square().mean((1, 2, 3))",
        "tests/surgery/test_channel_component.py",
    ),
    Mutant(
        "rewriter/surgery/channel_component.py",
        "return set() if found >= known else found",
        "return found",
        "tests/surgery/test_channel_component.py tests/rules/test_split_range.py",
    ),
    Mutant(
        "rewriter/rules/split_head.py",
        "\nAUTO_ERROR = 2.0",
        "\nAUTO_ERROR = 1.0",
        "tests/rules/test_split_head.py",
    ),
    Mutant(
        "rewriter/rules/split_head.py",
        "clamp_min(float(size.max()) * 1e-2",
        "clamp_min(float(size.max()) * 1.0",
        "tests/rules/test_split_head.py",
    ),
    # the ladder
    Mutant(
        "rewriter/ladder.py",
        "SPLIT_GAIN = 0.2",
        "SPLIT_GAIN = 0.0",
        "tests/test_ladder_splits.py",
    ),
    Mutant("rewriter/ladder.py", "\nSTARTS = 2", "\nSTARTS = 0", "tests/test_ladder.py"),
    Mutant(
        "rewriter/ladder.py",
        "kept=damage < bound",
        "kept=damage <= bound",
        "tests/test_ladder.py tests/test_ladder_splits.py",
    ),
    # ranking of layers
    Mutant(
        "rewriter/sensitivity/ranking_confidence.py",
        "\nEVEN = 0.75",
        "\nEVEN = 0.0",
        "tests/sensitivity/test_ranking_confidence.py",
    ),
    Mutant(
        "rewriter/sensitivity/ranking_confidence.py",
        "math.sqrt(2 * half / (1 + half))",
        "math.sqrt(half)",
        "tests/sensitivity/test_ranking_confidence.py",
    ),
    Mutant(
        "rewriter/sensitivity/ranking_confidence.py",
        "> errors * error)",
        "> error)",
        "tests/sensitivity/test_ranking_confidence.py",
    ),
    Mutant(
        "rewriter/sensitivity/ranking_confidence.py",
        "(i < place <= j for place",
        "(i <= place <= j for place",
        "tests/sensitivity/test_ranking_confidence.py",
    ),
    # damage
    Mutant(
        "rewriter/damage/fidelity.py",
        "total = total / max(len(self.groups), 1)",
        "total = total",
        "tests/damage",
    ),
    Mutant(
        "rewriter/damage/fidelity.py",
        "return torch.where(total.isnan(), torch.inf, total)",
        "return total",
        "tests/damage",
    ),
    Mutant(
        "rewriter/damage/fidelity.py", "p.exp() * (p - q)", "q.exp() * (q - p)", "tests/damage"
    ),
    Mutant(
        "rewriter/damage/fidelity.py", "return 0.5 * (_unit(f)", "return (_unit(f)", "tests/damage"
    ),
    Mutant("rewriter/damage/fidelity.py", "SMALLEST = 1e-12", "SMALLEST = 0.1", "tests/damage"),
    # the schedule
    Mutant(
        "search/strategy/schedule.py",
        "HARM, STRIKES = 1.5, 2",
        "HARM, STRIKES = 1e9, 2",
        f"{STRATEGY}/test_schedule.py",
    ),
    Mutant(
        "search/strategy/schedule.py",
        "HARM, STRIKES = 1.5, 2",
        "HARM, STRIKES = 1.5, 10**9",
        f"{STRATEGY}/test_schedule.py",
    ),
    Mutant(
        "search/strategy/schedule.py",
        "MIN_FLOAT_GAIN = 0.02",
        "MIN_FLOAT_GAIN = -1.0",
        f"{STRATEGY}/test_schedule.py",
    ),
    Mutant(
        "search/strategy/schedule.py",
        "TOGETHER = 6",
        "TOGETHER = 60",
        f"{STRATEGY}/test_schedule.py",
    ),
    Mutant(
        "search/strategy/schedule.py", "BETWEEN = 2", "BETWEEN = 1", f"{STRATEGY}/test_schedule.py"
    ),
    Mutant(
        "search/strategy/schedule.py",
        "MIN_LEFT = 0.02",
        "MIN_LEFT = 0.5",
        f"{STRATEGY}/test_schedule.py",
    ),
    Mutant(
        "search/strategy/schedule.py", "or len(scores) % 2", "", f"{STRATEGY}/test_schedule.py"
    ),
    Mutant(
        "search/strategy/space.py",
        "HARMLESS = 0.01",
        "HARMLESS = 0.0",
        f"{STRATEGY}/test_space.py",
    ),
    # schemes
    Mutant(
        "rewriter/int8/scheme.py",
        "+ (1 if self.symmetric else 0)",
        "",
        "tests/int8/test_scheme.py",
    ),
    Mutant(
        "rewriter/int8/scheme.py",
        "cut = (high - low) / span / 2",
        "cut = (high - low) / span",
        "tests/int8/test_scheme.py",
    ),
    Mutant(
        "rewriter/int8/scheme.py",
        "return 1 if layer.groups == 1 else None",
        "return 1",
        "tests/int8",
    ),
    Mutant(
        "rewriter/int8/onnx/lint.py",
        "\nKEPT_LEVELS = 0.25",
        "\nKEPT_LEVELS = 0.0",
        "tests/int8/onnx/test_lint.py",
    ),
    # costs
    Mutant(
        "rewriter/graph/cost.py",
        "return counter.get_total_flops() // 2",
        "return counter.get_total_flops()",
        "tests/graph/test_cost.py",
    ),
    Mutant(
        "rewriter/graph/cost.py",
        "return Cost(macs, params, int8 + 4 * (params - int8))",
        "return Cost(macs, params, int8)",
        "tests/graph/test_cost.py",
    ),
    Mutant(
        "rewriter/graph/cost.py",
        'if not n.meta.get("keep_float")]',
        "]",
        "tests/graph/test_cost.py",
    ),
    # racing
    Mutant(
        "search/scoring/racing.py",
        "\nSURE = 3.0",
        "\nSURE = 0.0",
        "tests/search/scoring/test_racing.py",
    ),
    Mutant(
        "search/scoring/racing.py",
        "\nWORTH_IT = 4",
        "\nWORTH_IT = 0",
        "tests/search/scoring/test_racing.py",
    ),
    Mutant(
        "search/scoring/racing.py", "+ 1 / count**2", "", "tests/search/scoring/test_racing.py"
    ),
    Mutant(
        "search/scoring/racing.py",
        "or self.cost(rival) > self.cost(score)",
        "",
        "tests/search/scoring/test_racing.py",
    ),
    # what unscored plans will do
    Mutant(
        "search/strategy/damage_model.py",
        "\nNOISE = 0.1",
        "\nNOISE = 10.0",
        f"{STRATEGY}/test_damage_model.py",
    ),
    Mutant(
        "search/strategy/damage_model.py",
        "\nDOUBT = 0.3",
        "\nDOUBT = 0.0",
        f"{STRATEGY}/test_damage_model.py",
    ),
    Mutant(
        "search/strategy/damage_model.py",
        "\nLEAST_DOUBT = 0.03",
        "\nLEAST_DOUBT = 0.0",
        f"{STRATEGY}/test_damage_model.py",
    ),
    Mutant(
        "search/strategy/damage_model.py",
        "and not score.stopped and score.damage",
        "and score.damage",
        f"{STRATEGY}/test_damage_model.py",
    ),
    Mutant(
        "search/strategy/step_conflicts.py",
        "if found is None or found.blocked:",
        "if found is None:",
        f"{STRATEGY}/test_step_conflicts.py",
    ),
    # the front
    Mutant(
        "search/pareto/front.py",
        "\nHARDLY_MORE = 1.25",
        "\nHARDLY_MORE = 1.0",
        "tests/search/pareto/test_front.py",
    ),
    Mutant(
        "search/pareto/front.py",
        "(np.ptp(values) / n) ** 2",
        "0.0",
        "tests/search/pareto/test_front.py",
    ),
    Mutant(
        "search/pareto/front.py",
        "near &= kinds <= kinds[i]",
        "pass",
        "tests/search/pareto/test_front.py",
    ),
    Mutant(
        "search/pareto/limits.py",
        "more <= 0 for more",
        "more < 0 for more",
        "tests/search/pareto/test_limits.py",
    ),
    Mutant(
        "search/pareto/limits.py",
        "if isinstance(rule, WholeModelRule) and not rule.replaces else None",
        "if isinstance(rule, WholeModelRule) else None",
        "tests/search/pareto/test_limits.py",
    ),
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
