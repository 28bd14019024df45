"""Identity: SHA-256 digests of texts, code, tensors, graphs and data, by which results are stored and found again."""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from rewriter.graph import facts

# Digests of tensors and graphs that are still alive, with the version counters they were made at.
_digests: WeakIdKeyDictionary = WeakIdKeyDictionary()


def key(parts: Iterable[str]) -> str:
    """One key for a list of texts, each of which matters."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def short(content: str | bytes) -> str:
    """32 hex digits of SHA-256: a name for what is no secret."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:32]


def code_digest(text: str) -> str:
    """Identity of what Python code computes: comments, docstrings and formatting do not count.

    Text that is no Python counts as it is.
    """
    try:
        tree = ast.parse(textwrap.dedent(text))
    except (SyntaxError, ValueError):
        return short(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # a text that stands alone anywhere computes nothing
            node.body = [s for s in node.body if not _is_text(s)]
    return short(ast.dump(tree))


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def graph_digest(gm: fx.GraphModule) -> str:
    """SHA-256 of a graph's code, input shapes and tensors; computed once while nothing changes."""
    tensors = gm.state_dict(keep_vars=True)
    # the sum sees what was changed behind autograd's back, and costs a tenth of the hash
    version = tuple((n, id(t), t._version, float(t.detach().sum())) for n, t in tensors.items())
    known = _digests.get(gm)
    if known is not None and known[0] == version:
        return known[1]
    text = key(
        [
            gm.code,
            repr(facts.EXAMPLE.get(gm)),
            *(f"{n} {tensor_digest(t)}" for n, t in tensors.items()),
        ]
    )
    _digests[gm] = (version, text)
    return text


def data_digest(batches: Iterable[Tensor | tuple[Tensor, ...]]) -> str:
    """SHA-256 of the inputs, batch by batch."""
    found: list[str] = []
    for batch in batches:
        for x in batch if isinstance(batch, tuple) else (batch,):
            known = _digests.get(x)
            if known is None or known[0] != x._version:
                known = _digests[x] = (x._version, tensor_digest(x))
            found.append(known[1])
    return key(found)


def tensor_digest(t: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and values."""
    plain = t.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    if plain.numel():
        digest.update(memoryview(plain.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


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
    digest.add(facts.EXAMPLE.of(gm))
    return digest.hex()
