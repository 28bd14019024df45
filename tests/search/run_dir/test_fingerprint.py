from __future__ import annotations

import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

import rewriter
from rewriter.storage import code_digest
from rewriter.storage.digest import Digest
from search.run_dir.fingerprint import DECIDING, rules_digest, source_digest


def digest(value: object) -> str:
    made = Digest()
    made.add(value)
    return made.hex()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool, torch.bfloat16])
def test_the_memory_order_of_a_tensor_does_not_count(dtype: torch.dtype) -> None:
    table = torch.arange(15).view(3, 5).to(dtype)
    assert digest(table[:1, 2]) == digest(table[:1, 2].clone().view(1))  # a stride of 5
    assert digest(table.T) == digest(table.T.contiguous())
    assert digest(table) != digest(table.T)


def test_values_types_and_nesting_count() -> None:
    assert digest(torch.tensor([1.0])) != digest(torch.tensor([2.0]))
    assert digest(torch.tensor([1.0])) != digest(torch.tensor([[1.0]]))
    assert digest([1, [2]]) != digest([[1], 2])
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(torch.tensor(3)) != digest(3)


def test_where_a_source_file_lies_does_not_count(tmp_path: Path) -> None:
    """Another checkout, or a worker with another install, goes on with the scores of the first."""
    found: set[str] = set()
    for folders in (("a", "b"), ("b", "a")):
        made: list[Any] = []
        for folder, name in zip(folders, ("one", "two"), strict=True):
            place = tmp_path / "".join(folders) / folder
            place.mkdir(parents=True)
            (place / f"source_{name}.py").write_text(f"def {name}(): return 1\n")
            spec = spec_from_file_location(f"source_{name}", place / f"source_{name}.py")
            assert spec is not None and spec.loader is not None
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            made.append(getattr(module, name))
        found.add(source_digest(*made))
    assert len(found) == 1


RULE = """
class Rule:
    \"\"\"Merge two layers.\"\"\"

    def apply(self, x: float) -> float:
        # twice
        return 2 * x
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("Merge two layers.", "Merge two layers into one.", True),
        ("        # twice\n", "        # doubled\n\n", True),
        ("2 * x", "(2 * x)", True),
        ("        return", "        'a text alone'\n        return", True),
        ("2 * x", "3 * x", False),
        ("def apply(self, x: float)", "def apply(self, x: float, y: float = 0.0)", False),
        ("def apply", "def applied", False),
    ],
)
def test_code_is_known_by_what_it_computes(old: str, new: str, same: bool) -> None:
    assert old in RULE
    assert (code_digest(RULE.replace(old, new)) == code_digest(RULE)) == same


def test_text_that_is_no_python_counts_as_it_is() -> None:
    assert code_digest("a: [") != code_digest("a: [ ")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "rewriter"
    shutil.copytree(
        Path(rewriter.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("rules/merge_separable.py", '"""', '"""Said in another way: ', True),
        ("assemble.py", "\n\n\n", "\n\n\n# a remark\n\n\n", True),
        ("rules/round_weights.py", "import annotations\n", "import annotations\nA = 1\n", False),
        (
            "repair/weight_rounding.py",
            "import annotations\n",
            "import annotations\nA = 1\n",
            False,
        ),
        ("damage/fidelity.py", "import annotations\n", "import annotations\nA = 1\n", False),
        ("int8/onnx/export.py", "import annotations\n", "import annotations\nA = 1\n", False),
        ("sensitivity/screen.py", "import annotations\n", "import annotations\nA = 1\n", True),
        ("storage/files.py", "import annotations\n", "import annotations\nA = 1\n", True),
        ("ladder.py", "import annotations\n", "import annotations\nA = 1\n", True),
    ],
)
def test_scores_are_kept_until_what_a_plan_computes_changes(
    copied: Path, file: str, old: str, new: str, same: bool
) -> None:
    before = rules_digest(copied)
    assert before == rules_digest()
    path = copied / file
    text = path.read_text()
    assert old in text
    try:
        path.write_text(text.replace(old, new, 1))
        assert (rules_digest(copied) == before) == same
    finally:
        path.write_text(text)


def test_every_part_that_decides_exists() -> None:
    folder = Path(rewriter.__file__).parent
    assert all((folder / name).exists() for name in DECIDING)
