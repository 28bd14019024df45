"""Where a network can come from: one file for each key of ``model:``, called ``from_KEY``.

A new source is a file here with ``load(cfg) -> nn.Module`` (and, where it knows how an image becomes an input,
``preprocessing(cfg)``), a line in `search.config.schema.ModelConfig`, and a test. A file is imported when its key is
used, so that what it needs may be missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from search.config.inputs import MODEL_KEYS
from search.config.schema import Config

__all__ = ["MODEL_SOURCES", "load_source", "preprocessing_of"]

MODEL_SOURCES: Mapping[str, str] = {key: f"{__name__}.from_{key}" for key in MODEL_KEYS}
"""Key of ``model:`` to the module that loads it."""


def load_source(cfg: Config) -> nn.Module:
    """The network of a config, as its source returns it.

    Raises:
        ConfigError: it cannot be had.
    """
    load: Callable[[Config], nn.Module] = _module(cfg).load
    return load(cfg)


def preprocessing_of(cfg: Config) -> dict[str, Any]:
    """How an image becomes an input of the network, as far as its source knows."""
    known: Callable[[Config], dict[str, Any]] | None = getattr(_module(cfg), "preprocessing", None)
    return {} if known is None else known(cfg)


def _module(cfg: Config) -> Any:
    return importlib.import_module(MODEL_SOURCES[cfg.model.source])
