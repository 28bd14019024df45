"""What an installed wheel gives without a checkout: the command, the targets, the demo, and init."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content and nothing else; its dependencies are this Python's."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(ROOT)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "hatchling" in build.stderr and build.returncode:
        pytest.skip("hatchling, which builds the wheel, is not installed")
    assert build.returncode == 0, build.stderr
    (wheel,) = folder.glob("*.whl")
    place = folder / "site"
    words = [*pip, "install", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    subprocess.run(words, check=True)
    return place


def run(place: Path, folder: Path, *words: str) -> tuple[int, str]:
    """A command of the installed package, with no other copy of it within reach."""
    start = (
        f"import sys; sys.path.insert(0, {str(place)!r}); import search.cli.main as c; "
        f"assert c.__file__.startswith({str(place)!r}), c.__file__; "
        f"sys.argv = ['quantfix', *{list(words)!r}]; c.main()"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", start], cwd=folder, env=env, capture_output=True, text=True, check=False
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_alone_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    assert (installed / "bin" / "quantfix").exists()
    code, said = run(installed, tmp_path, "demo", "--trials", "1", "--out", "run")
    assert code == 0, said
    assert (tmp_path / "run" / "report.html").exists()
    code, said = run(installed, tmp_path, "front", "run")
    assert code == 0 and "plain int8" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "detection", "video"])
def test_the_wheel_alone_writes_a_start(installed: Path, tmp_path: Path, kind: str) -> None:
    assert run(installed, tmp_path, "init", kind)[0] == 0
    code, said = run(installed, tmp_path, "check", "mine.yaml")
    assert code == 2
    assert "FILL IN: build() must return your network" in said
