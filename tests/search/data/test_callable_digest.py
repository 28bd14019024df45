"""A callable of the user's is known by what it computes, whatever else its file says."""

from __future__ import annotations

from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from search.data.user_code import callable_digest

TEXT = """
import torch

SCALE = 2.0

def half(x):
    return x / 2

def metric(outputs, targets):
    \"\"\"How far off.\"\"\"
    # all of them
    return SCALE * float(half(torch.abs(outputs - targets)).mean())

TRIALS = 60
"""


def loaded(folder: Path, text: str) -> Any:
    file = folder / "script.py"
    file.write_text(text)
    spec = spec_from_file_location("script", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    import linecache

    linecache.clearcache()
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("TRIALS = 60", "TRIALS = 100", True),
        ("How far off.", "The error.", True),
        ("# all of them", "# each", True),
        ("SCALE = 2.0", "SCALE = 3.0", False),
        ("return x / 2", "return x / 3", False),
        (".mean()", ".sum()", False),
    ],
)
def test_what_a_metric_uses_counts_and_nothing_else(
    tmp_path: Path, old: str, new: str, same: bool
) -> None:
    before = callable_digest(loaded(tmp_path, TEXT).metric)
    assert callable_digest(loaded(tmp_path, TEXT).metric) == before
    after = callable_digest(loaded(tmp_path, TEXT.replace(old, new)).metric)
    assert (after == before) == same


def test_closures_arguments_and_state_count() -> None:
    def scaled(scale: float) -> Any:
        return lambda outputs, targets: scale * float(outputs.sum())

    class Decode:
        def __init__(self, threshold: Any) -> None:
            self.threshold = threshold

        def __call__(self, outputs: Any) -> Any:
            return outputs > self.threshold

    assert callable_digest(scaled(1.0)) == callable_digest(scaled(1.0))
    assert callable_digest(scaled(1.0)) != callable_digest(scaled(2.0))
    assert callable_digest(Decode(0.5)) == callable_digest(Decode(0.5))
    assert callable_digest(Decode(0.5)) != callable_digest(Decode(0.6))
    assert callable_digest(Decode(torch.ones(2))) != callable_digest(Decode(torch.zeros(2)))
    add = scaled(1.0)
    assert callable_digest(partial(add, a=1)) != callable_digest(partial(add, a=2))


def test_without_its_source_a_function_is_known_by_its_bytecode() -> None:
    def made(text: str) -> Any:
        space: dict[str, Any] = {}
        exec(f"def metric(outputs, targets):\n    return {text}\n", space)
        return space["metric"]

    assert callable_digest(made("1.0")) == callable_digest(made("1.0"))
    assert callable_digest(made("1.0")) != callable_digest(made("2.0"))
