from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from rewriter.storage.digest import Digest
from search.run_dir.fingerprint import source_digest


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
