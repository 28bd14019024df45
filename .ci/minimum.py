"""Run the fast tests with the oldest versions that pyproject.toml claims.

    python .ci/minimum.py [arguments of pytest]

What is installed at exactly its minimum stays as it is: torch is not installed twice. Older versions of
the others are laid over it in a folder of their own, and the tests run with that folder in front.
Packages that need torch are laid over without their dependencies, which are there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def minimums() -> dict[str, Version]:
    """The lower bound of each dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, Version] = {}
    for text in project["dependencies"]:
        requirement = Requirement(text)
        (bound,) = (s for s in requirement.specifier if s.operator == ">=")
        found[requirement.name] = Version(bound.version)
    return found


def needs_torch(name: str) -> bool:
    """Whether a package requires torch outside its extras."""
    needed = (Requirement(r) for r in metadata.requires(name) or [])
    return any(r.name == "torch" and "extra" not in str(r.marker) for r in needed)


def main() -> None:
    claimed = minimums()
    older = {n: v for n, v in claimed.items() if Version(metadata.version(n)) != v}
    same = sorted(claimed.keys() - older.keys())
    print(f"at their minimum already: {', '.join(same) or 'none'}")
    if "torch" in older:
        sys.exit(
            f"torch: {metadata.version('torch')} is installed, pyproject.toml claims {older['torch']}"
        )
    if not older:
        print("every dependency is installed at its minimum: the fast tests have tested them")
        return
    print("older than installed:", ", ".join(f"{n} {v}" for n, v in sorted(older.items())))
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "pins.txt")
        pins.write_text("".join(f"{n}=={v}\n" for n, v in claimed.items()))
        place = str(Path(folder, "packages"))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", place]
        for bare in (False, True):
            names = [f"{n}=={v}" for n, v in older.items() if needs_torch(n) == bare]
            if names:
                options = ["--no-deps", "--upgrade"] if bare else ["--constraint", str(pins)]
                subprocess.run([*pip, *options, *names], check=True)
        path = os.pathsep.join([place, *filter(None, [os.environ.get("PYTHONPATH")])])
        words = [sys.executable, "-m", "pytest", *sys.argv[1:]]
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
