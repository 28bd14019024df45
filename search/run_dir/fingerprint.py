"""Identity of all that a score depends on: a stored score is used only where it is true."""

from __future__ import annotations

import inspect
from pathlib import Path

import rewriter
from rewriter import RULES
from rewriter.storage import Digest


def source_digest(*objects: object) -> str:
    """Hash of the source files that define `objects`, functions or instances of classes."""
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
    digest.add(sorted(_text(Path(f)) for f in files))  # whatever folders they lie in
    return digest.hex()


def rules_digest() -> str:
    """Hash of the rules' versions and of the code that turns a plan into an int8 network."""
    folder = Path(rewriter.__file__).parent
    digest = Digest()
    digest.add(sorted(f"{rule.name}:{rule.version}" for rule in RULES))
    digest.add(
        [_text(path) for path in sorted(folder.rglob("*.py")) if "sensitivity" not in path.parts]
    )
    digest.add([source_digest(rule) for rule in RULES])
    return digest.hex()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
