"""Faces with identities, as LFW lists them: the images of a list of pairs, each with the number of its person.

A line is ``NAME 1 2`` (two images of one person) or ``NAME 1 OTHER 3``; other lines (counts in the head) are passed over. An
image is ``NAME/NAME_0001.jpg``. The task compares all pairs of these images, not the listed ones alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from search.config.messages import reason
from search.config.schema import ConfigError, DataConfig
from search.data.images import EXTENSIONS, Data, Preprocessing, need_folders, split_files


def paired_faces(table: Path, images: Path, cfg: DataConfig, preprocessing: Preprocessing) -> Data:
    """The images of a list of pairs, each with the number of its person; errors as for `pair_list`."""
    files, people, names = pair_list(table, images)
    return replace(split_files(table, files, people, cfg, preprocessing), names=names)


def pair_list(table: Path, images: Path) -> tuple[list[Path], list[int], dict[int, str]]:
    """Files, the number of the person on each, and their names.

    Raises:
        ConfigError: the list cannot be read, or names an image that is not there, or none.
    """
    need_folders(images=images)
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.pairs: cannot be read: {table}: {reason(error)}") from error
    wanted: dict[tuple[str, int], int] = {}
    for line_number, line in enumerate(lines, 1):
        words = line.replace("\t", " ").split()
        places = {3: ((0, 1), (0, 2)), 4: ((0, 1), (2, 3))}.get(len(words), ())
        for name, index in places:
            if not words[index].isdigit():
                fact = f"expected NAME 1 2 or NAME 1 OTHER 3: {line.strip()!r}"
                raise ConfigError(f"data.pairs: {table.name}:{line_number}: {fact}")
            wanted.setdefault((words[name], int(words[index])), line_number)
    if not wanted:
        raise ConfigError(f"data.pairs: {table.name}: lists no pairs")
    people = {name: i for i, name in enumerate(sorted({name for name, _ in wanted}))}
    files = [_file(images, name, index, table, line) for (name, index), line in wanted.items()]
    return files, [people[name] for name, _ in wanted], {i: n for n, i in people.items()}


def _file(images: Path, name: str, index: int, table: Path, line: int) -> Path:
    for ending in sorted(EXTENSIONS):
        file = images / name / f"{name}_{index:04d}{ending}"
        if file.is_file():
            return file
    raise ConfigError(
        f"data.pairs: {table.name}:{line}: no image {name}/{name}_{index:04d} in {images}"
    )
