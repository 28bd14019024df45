"""``model: {tflite: FILE}``: the float network in a TensorFlow Lite file, with channels first; needs ``quantfix[litert]``."""

from __future__ import annotations

from typing import Any

from torch import nn

from rewriter.errors import TraceError
from rewriter.tflite_import import import_tflite, tflite_sizes
from search.config.schema import Config, ConfigError
from search.data.sources._file_input import image_size


def load(cfg: Config) -> nn.Module:
    """The network, with a free batch.

    Raises:
        ConfigError: the file cannot be read or imported; all operators that are not known are named.
    """
    if cfg.model.args:
        raise ConfigError(f"model.args.{next(iter(cfg.model.args))}: unknown for tflite")
    try:
        return import_tflite(cfg.resolve(str(cfg.model.tflite)))
    except TraceError as error:
        raise ConfigError(f"model.{error}") from error


def preprocessing(cfg: Config) -> dict[str, Any]:
    """The size of the input, if it is an image; mean and std are not written in such a file."""
    try:
        sizes = tflite_sizes(cfg.resolve(str(cfg.model.tflite)))
    except TraceError as error:
        raise ConfigError(f"model.{error}") from error
    return image_size(sizes)
