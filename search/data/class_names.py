"""Names of the classes, for pages that show them: given in the config, or found beside the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from search.config.messages import reason
from search.config.schema import Config, ConfigError

# Where tools for YOLO labels write them: in the folder of the labels or one or two above it.
BESIDE = ("classes.txt", "obj.names", "data.yaml", "dataset.yaml")


def class_names(cfg: Config, made: Any = None) -> dict[int, str]:
    """Names by class index; empty where none are known.

    Args:
        cfg: ``data.names`` is a list, or a file: YAML with ``names``, or text with one name in each line.
        made: What a factory returned, whose ``names`` count where the config has none.

    Raises:
        ConfigError: ``data.names`` cannot be read, or holds something else.
    """
    given = cfg.data.names
    if isinstance(given, str):
        return _of_file(cfg.resolve(given))
    if given is None:
        given = getattr(made, "names", None)
    if given is not None:
        return _numbered(given) or {}
    return {} if cfg.data.yolo is None else _beside(cfg.resolve(cfg.data.yolo))


def _beside(labels: Path) -> dict[int, str]:
    """Of the first file of names that can be read as one; a file of another purpose is passed over."""
    for folder in (labels, *list(labels.parents)[:2]):
        for name in BESIDE:
            if (folder / name).is_file():
                try:
                    return _of_file(folder / name)
                except ConfigError:
                    continue
    return {}


def _of_file(file: Path) -> dict[int, str]:
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if file.suffix in (".yaml", ".yml") else text.splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.names: cannot be read: {file}: {reason(error)}") from error
    except yaml.YAMLError as error:
        fact = str(error).replace("\n", " ")
        raise ConfigError(f"data.names: {file}: not YAML: {fact}") from error
    if isinstance(content, dict) and "names" in content:
        content = content["names"]
    found = _numbered(content)
    if found is None:
        raise ConfigError(
            f"data.names: {file}: expected names: [a, b, ...], or one name in each line"
        )
    return found


def _numbered(given: object) -> dict[int, str] | None:
    """By index: of a list, or of a mapping from numbers; None where it is neither."""
    if isinstance(given, Mapping):
        pairs = list(given.items())
        if not all(isinstance(key, int) or str(key).isdigit() for key, _ in pairs):
            return None
        return {int(key): str(name) for key, name in pairs}
    if isinstance(given, Sequence) and not isinstance(given, str):
        return {i: str(name).strip() for i, name in enumerate(given)}
    return None
