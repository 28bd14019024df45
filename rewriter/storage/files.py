"""Files in a folder, or behind an fsspec URL such as ``s3://bucket/run``: each is there as a whole, or not at all.

A file is written under another name, flushed to the disk and then renamed. An object store shows an object when it is complete, and
a file system behind a URL is given the same two steps; what a reader makes of a file that is damaged all the same is its own affair.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

Place = Path | str
"""A folder, or an fsspec URL."""


class PlaceError(OSError):
    """A URL cannot be read or written; the message names it and says why."""


@contextmanager
def replacing(path: Path, mode: str = "w") -> Generator[IO[Any]]:
    """Write a file that readers see only when it is complete; until then they see the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def inside(place: Place, name: str) -> Place:
    """The folder called ``name`` in a place."""
    return place / name if isinstance(place, Path) else f"{place.rstrip('/')}/{name}"


def read(place: Place, name: str) -> bytes | None:
    """The content of a file; None where there is none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        if isinstance(place, Path):
            return (place / name).read_bytes()
        files, root = _opened(place)
        found: bytes = _asked(place, files.cat_file, f"{root}/{name}")
    except FileNotFoundError:
        return None
    return found


def write(place: Place, name: str, data: bytes) -> None:
    """Write a file, whole or not at all; one that is there is replaced.

    Raises:
        OSError: it cannot be written.
    """
    if isinstance(place, Path):
        with replacing(place / name, "wb") as file:
            file.write(data)
        return
    files, root = _opened(place)
    path = f"{root}/{name}"
    part = f"{path}.{uuid.uuid4().hex}.part"
    _asked(place, files.makedirs, path.rpartition("/")[0], exist_ok=True)
    _asked(place, files.pipe_file, part, data)
    _asked(place, files.mv, part, path)


def names(place: Place) -> list[str]:
    """The names of the whole files in a place, sorted; none where there is no such place.

    Raises:
        OSError: it cannot be listed.
    """
    if isinstance(place, Path):
        found = [p.name for p in place.iterdir()] if place.is_dir() else []
    else:
        files, root = _opened(place)
        files.invalidate_cache()
        try:
            paths: list[Any] = _asked(place, files.ls, root, detail=False)
        except FileNotFoundError:
            return []
        found = [str(p).rstrip("/").rpartition("/")[2] for p in paths]
    return sorted(name for name in found if not name.endswith(".part"))


def checked(text: str) -> str:
    """A URL that can be opened here.

    Raises:
        PlaceError: what it names is unknown, or needs a package that is not installed.
    """
    _opened(text)
    return text


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Asked for each time: a connection does not survive a fork."""
    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as cause:
        raise PlaceError(f"{url}: cannot be opened: {cause}") from cause
    return files, str(root).rstrip("/")


def _asked(url: str, action: Any, *words: Any, **options: Any) -> Any:
    """What a file system answers. Each has exceptions of its own (network, credentials), which come as one."""
    try:
        return action(*words, **options)
    except FileNotFoundError:
        raise
    except Exception as cause:
        said = " ".join(str(cause).split()) or type(cause).__name__
        raise PlaceError(f"{url}: {said}") from cause
