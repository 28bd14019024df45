"""Identity of all that a score depends on: a stored score is used only where it is true."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import rewriter
from rewriter import RULES


class Digest:
    """A running hash of tensors and of plain values that hold tensors."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, value: Any) -> None:
        """Take in a tensor, a number, a text, or a sequence or mapping of those."""
        if isinstance(value, Tensor):
            self._hash.update(f"{value.dtype}{tuple(value.shape)}".encode())
            # one element counts as contiguous whatever its stride, and then has no view as bytes
            flat = torch.empty(value.numel(), dtype=value.dtype)
            flat.copy_(value.detach().reshape(-1))
            self._hash.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                self.add(str(key))
                self.add(value[key])
        elif isinstance(value, list | tuple):
            self._hash.update(f"[{len(value)}".encode())
            for item in value:
                self.add(item)
        else:
            self._hash.update(f"{type(value).__name__}:{value!r};".encode())

    def hex(self) -> str:
        return self._hash.hexdigest()[:32]


def model_digest(gm: fx.GraphModule) -> str:
    """Hash of a canonical graph: its structure, its modules' settings and its weights."""
    digest = Digest()
    digest.add(gm.code)
    digest.add(
        [f"{name}={type(m).__name__}({m.extra_repr()})" for name, m in gm.named_modules() if name]
    )
    digest.add(gm.state_dict())
    digest.add(gm.meta["example"])
    return digest.hex()


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
