"""Identity of all that a score depends on: a stored score is used only where it is true."""

from __future__ import annotations

import inspect
from functools import lru_cache
from pathlib import Path

import rewriter
from rewriter import RULES
from rewriter.storage import Digest, code_digest

# What decides what the int8 network of a plan computes: not how layers are ranked, what is searched or what is written.
DECIDING = (
    "assemble.py",
    "damage",
    "fitting",
    "graph",
    "int8",
    "plan.py",
    "repair",
    "rules",
    "surgery",
    "tracing",
)


def source_digest(*objects: object) -> str:
    """Identity of the code in the files that define `objects`, functions or instances of classes."""
    files = set[str]()
    texts: list[str] = []
    for item in objects:
        owner = item if inspect.isroutine(item) or inspect.isclass(item) else type(item)
        try:
            files.add(str(inspect.getsourcefile(owner)))  # pyright: ignore[reportArgumentType]
        except TypeError:
            texts.append(repr(owner))
    digest = Digest()
    digest.add(texts)
    digest.add(sorted(_code(Path(f)) for f in files))  # whatever folders they lie in
    return digest.hex()


def rules_digest(folder: Path | None = None) -> str:
    """Identity of the rules' versions and of the code that turns a plan into an int8 network.

    Args:
        folder: Of the package ``rewriter``; None: the one that runs.
    """
    folder = folder or Path(rewriter.__file__).parent
    digest = Digest()
    digest.add(sorted(f"{rule.name}:{rule.version}" for rule in RULES))
    for name in DECIDING:
        place = folder / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.add([path.relative_to(folder).as_posix(), _code(path)])
    digest.add([source_digest(rule) for rule in RULES])
    return digest.hex()


def _code(path: Path) -> str:
    try:
        return _code_at(path, path.stat().st_mtime_ns)
    except OSError:
        return ""


@lru_cache(maxsize=1000)
def _code_at(path: Path, changed_ns: int) -> str:
    del changed_ns  # so that a file which has changed is read again
    return code_digest(path.read_text(encoding="utf-8"))
