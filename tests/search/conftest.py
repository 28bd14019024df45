from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from search.config.schema import Config, load_config

MODEL = 'model: {factory: "mine:net"}'


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Config]]:
    """Writes a config, and mine.py beside it; nothing imported from there outlives the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(data: str = "{npz: none.npz}", model: str = MODEL, code: str = "") -> Config:
        if code:
            (tmp_path / "mine.py").write_text(code, encoding="utf-8")
        file = tmp_path / "run.yaml"
        file.write_text(f"task: classification\n{model}\ndata: {data}\n", encoding="utf-8")
        return load_config(file)

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("mine"):
            del sys.modules[name]
