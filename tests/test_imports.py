"""The arrows of the architecture, on the source text: who may import whom, how long a file is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from rewriter.rules import RULES

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(p for folder in ("rewriter", "search") for p in (ROOT / folder).rglob("*.py"))
FORBIDDEN = {
    "utils",
    "helpers",
    "helper",
    "common",
    "base",
    "core",
    "manager",
    "factory",
    "misc",
    "v2",
}
MAY_IMPORT_TIMM = {"search/data.py", "search/images.py", "rewriter/canonical.py"}
# Rules that share the file of another one, without their parameter.
SHARES_FILE = {"merge_linear_separable": "merge_separable", "split_weights": "split_range"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Full names of the project's modules, and top names of others, that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            name = str(node.module)
            inner = {f"{name}.{a.name}" for a in node.names}
            found |= {i for i in inner if is_module(i)} | (
                {name} if not all(map(is_module, inner)) else set()
            )
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


IMPORTS = {module_name(p): imports(p) for p in FILES}


def inside(name: str, *prefixes: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def test_rewriter_never_imports_search() -> None:
    for name, used in IMPORTS.items():
        if inside(name, "rewriter"):
            assert not [u for u in used if inside(u, "search", "optuna", "pydantic", "typer")], (
                name
            )


def test_errors_and_tracing_stand_at_the_bottom() -> None:
    allowed = {
        "rewriter.errors": set(),
        "rewriter.assignment": set(),
        "rewriter.proxy": {"rewriter.assignment"},
        "rewriter.surroundings": {"rewriter.proxy"},
        "rewriter.tracer": {
            *("rewriter.errors", "rewriter.proxy"),
            *("rewriter.assignment", "rewriter.surroundings"),
        },
        "rewriter.verify": {"rewriter.errors", "rewriter.tracer"},
        "rewriter.graph": {
            *("rewriter.errors", "rewriter.tracer", "rewriter.verify"),
            "rewriter.canonical",
        },
        "rewriter.cost": {"rewriter.graph"},
    }
    for name, used in allowed.items():
        assert {u for u in IMPORTS[name] if inside(u, "rewriter")} <= used, name
    # the one arrow upwards, inside trace(), is not taken on import
    top = imports(ROOT / "rewriter/graph.py", everywhere=False)
    assert "rewriter.canonical" not in top


def test_canonical_form_knows_no_int8() -> None:
    upper = (
        "rewriter.int8",
        "rewriter.rules",
        "rewriter.plan",
        "rewriter.fit",
        "rewriter.sensitivity",
    )
    for name in (
        "canonical",
        "functional",
        "fold",
        "loops",
        "sizes",
        "recognise",
        "cost",
        "ranges",
    ):
        assert not [u for u in IMPORTS[f"rewriter.{name}"] if inside(u, *upper)], name


def test_int8_knows_no_rules_and_no_sensitivity() -> None:
    upper = (
        "rewriter.rules",
        "rewriter.plan",
        "rewriter.fit",
        "rewriter.sensitivity",
        "rewriter.assemble",
    )
    for name, used in IMPORTS.items():
        if inside(name, "rewriter.int8"):
            assert not [u for u in used if inside(u, *upper)], name


def test_rules_know_neither_plans_nor_each_other_nor_engines() -> None:
    engines = (
        "rewriter.int8.simulate",
        "rewriter.int8.onnx",
        "rewriter.int8.session",
        "onnxruntime",
        "onnx",
    )
    for name, used in IMPORTS.items():
        if not inside(name, "rewriter.rules") or name == "rewriter.rules":
            continue
        own = [u for u in used if inside(u, "rewriter.rules")]
        assert all(u.rsplit(".", 1)[1].startswith("_") for u in own), f"{name}: {own}"
        assert not [u for u in used if inside(u, "rewriter.plan", "rewriter.fit", *engines)], name


def test_search_goes_one_way() -> None:
    # front is arithmetic on scores alone, and so stands low
    order = ["front", "config", "data", "tasks", "evaluator", "space", "study", "report", "cli"]
    for name, used in IMPORTS.items():
        parts = name.split(".")
        if parts[0] != "search" or len(parts) < 2 or parts[1] not in order:
            continue
        for u in used:
            other = u.split(".")
            if other[0] == "search" and len(other) > 1 and other[1] in order:
                assert order.index(other[1]) <= order.index(parts[1]), f"{name} imports {u}"


def test_timm_only_where_models_are_loaded() -> None:
    for path in FILES:
        name = str(path.relative_to(ROOT))
        if any(inside(u, "timm") for u in IMPORTS[module_name(path)]):
            assert name in MAY_IMPORT_TIMM, name


def test_no_cycles_on_import() -> None:
    graph = {
        module_name(p): {u for u in imports(p, everywhere=False) if u in IMPORTS} for p in FILES
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name in done:
            return
        for other in graph[name]:
            # a package that re-exports is imported by asking for its parts, which is no cycle
            if not inside(name, other):
                visit(other, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_length_and_name(path: Path) -> None:
    length = len(path.read_text().splitlines())
    assert length <= 400, f"{length} lines"
    assert path.stem.strip("_") not in FORBIDDEN


def test_length_and_name_of_tests() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        assert path.stem not in FORBIDDEN, path


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_every_rule_has_its_test_file(rule) -> None:
    file = type(rule).__module__.rsplit(".", 1)[1]
    assert (ROOT / "rewriter/rules" / f"{file}.py").is_file()
    assert (ROOT / "tests/rules" / f"test_{file}.py").is_file(), f"{rule.name}: no test"
    plain = rule.name.rstrip("0123456789").rstrip("_")
    assert rule.name.startswith(file) or SHARES_FILE.get(plain) == file, (
        f"{rule.name} in {file}.py"
    )


def test_every_rule_file_is_in_the_catalogue() -> None:
    listed = {type(r).__module__.rsplit(".", 1)[1] for r in RULES}
    files = {p.stem for p in (ROOT / "rewriter/rules").glob("*.py") if not p.stem.startswith("_")}
    assert files == listed
