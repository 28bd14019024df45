from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of trained networks and images; tests that need it are skipped without it."""
    folder = Path(os.environ.get("QUANTFIX_ASSETS") or ROOT.parent / "shared" / "assets")
    if not (folder / "zoo.py").is_file():
        pytest.skip(f"no assets at {folder}; QUANTFIX_ASSETS says where they are")
    return folder
