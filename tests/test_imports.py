"""The arrows of the architecture, on the source text: who may import whom, how long a file is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from rewriter.rules import RULES

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    p for folder in ("quantfix", "rewriter", "search") for p in (ROOT / folder).rglob("*.py")
)
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
MAY_IMPORT_TIMM = {
    "search/data/sources/from_timm.py",
    "search/data/images.py",
    "search/data/lite0.py",
    "rewriter/tracing/canonicalize.py",
}
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


# Packages (and single files at the top of one) from the bottom up: each may import from those on
# floors below its own, never from its own floor or above.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("rewriter.errors", "rewriter.graph"),
    ("rewriter.storage",),
    ("rewriter.tracing", "rewriter.int8", "rewriter.damage", "rewriter.onnx_import"),
    ("rewriter.surgery", "rewriter.repair", "rewriter.tflite_import"),
    ("rewriter.rules",),
    ("rewriter.plan",),
    ("rewriter.ladder", "rewriter.fitting", "rewriter.sensitivity"),
    ("rewriter.assemble",),
    ("rewriter.export",),
    ("rewriter",),
    ("search.engines",),
    ("search.config",),
    ("search.data", "search.run_dir"),
    ("search.latency",),
    ("search.tasks", "search.pareto"),
    ("search.scoring",),
    ("search.job", "search.sensitivity"),
    ("search.strategy", "search.finetune", "search.export"),
    ("search.results", "search.study"),
    ("search.run",),
    ("search.report", "search.workers"),
    ("search.optimize",),
    ("search.cli",),
    ("quantfix",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def room(name: str) -> str:
    """The package that a module belongs to: ``rewriter.graph`` for ``rewriter.graph.edit``."""
    return name.split(".")[0] if inside(name, "quantfix") else ".".join(name.split(".")[:2])


def test_packages_stand_on_strict_floors() -> None:
    wrong = [
        f"{name} imports {u}"
        for name, used in IMPORTS.items()
        for u in used
        if u in IMPORTS and room(u) != room(name) and FLOOR[room(u)] >= FLOOR[room(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_every_package_has_a_floor_and_every_floor_a_package() -> None:
    assert {room(name) for name in IMPORTS} - {"search"} == set(FLOOR)


def test_rewriter_never_imports_search() -> None:
    for name, used in IMPORTS.items():
        if inside(name, "rewriter"):
            assert not [
                u for u in used if inside(u, "search", "quantfix", "optuna", "pydantic", "typer")
            ], name


def exported(package: str) -> set[str]:
    """What ``__all__`` of a package, or of a file at the top of one, lists."""
    path = ROOT.joinpath(*package.split("."))
    tree = ast.parse(
        (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    )
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_search_takes_only_what_the_packages_of_rewriter_export() -> None:
    wrong: list[str] = []
    for path in FILES:
        if not inside(module_name(path), "search", "quantfix"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and inside(str(node.module), "rewriter"):
                names = {a.name for a in node.names} - exported(str(node.module))
                wrong += [f"{module_name(path)}: {node.module}.{n}" for n in names]
    assert not wrong, "\n".join(sorted(wrong))


def test_rules_know_neither_engines_nor_each_other() -> None:
    engines = ("rewriter.int8.simulate", "rewriter.int8.onnx", "onnxruntime", "onnx")
    for name, used in IMPORTS.items():
        if not inside(name, "rewriter.rules") or name == "rewriter.rules":
            continue
        own = [u for u in used if inside(u, "rewriter.rules")]
        assert all(u.rsplit(".", 1)[1].startswith("_") for u in own), f"{name}: {own}"
        assert not [u for u in used if inside(u, *engines)], name


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
