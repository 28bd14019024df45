"""A folder of fitted weights, addressed by what they were fitted from.

One file for each fit, named by the SHA-256 of everything that determines it (``rewriter.storage.files``): a
reader sees the whole file or none, two writers of one fit write the same and the last one wins, and
one that is killed leaves only a temporary file behind, which nobody reads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rewriter.storage.files import read, write

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mirror:
    """A folder of this machine, and behind it an fsspec URL with the same files, shared with other machines."""

    folder: Path
    url: str


Store = Path | Mirror


def load(store: Store, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts stored under ``name``; None where there are none, or they are damaged.

    Raises:
        PlaceError: the URL of a mirror cannot be read.
    """
    folder = store.folder if isinstance(store, Mirror) else store
    path = folder / _file(name)
    found = _loaded(path)
    if found is None and isinstance(store, Mirror):
        data = read(store.url, _file(name))
        if data is not None:
            write(folder, _file(name), data)
            found = _loaded(path)
    return found


def _loaded(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {k: file.get_tensor(k) for k in file.keys()}, facts  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as damage:
        log.warning("%s: unreadable, fitted again: %s", path, damage)
        return None


def save_to(
    store: Store, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Store tensors and facts under ``name``, whole or not at all.

    Raises:
        OSError: they cannot be written.
    """
    plain = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    data = save(plain, metadata={"facts": json.dumps(dict(facts))})
    write(store.folder if isinstance(store, Mirror) else store, _file(name), data)
    if isinstance(store, Mirror):
        write(store.url, _file(name), data)


def _file(name: str) -> str:
    return f"{name[:2]}/{name}.safetensors"
