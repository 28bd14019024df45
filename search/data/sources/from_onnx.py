"""``model: {onnx: FILE}``: the float network in an ONNX file; ``args: {shape: [3, 224, 224]}`` where it leaves sizes open."""

from __future__ import annotations

from typing import Any

from torch import nn

from rewriter.errors import TraceError
from rewriter.onnx_import import file_sizes, import_onnx
from search.config.schema import Config, ConfigError
from search.data.sources._file_input import image_size

KNOWN = ("shape",)


def load(cfg: Config) -> nn.Module:
    """The network, with a free batch.

    Raises:
        ConfigError: the file cannot be read or imported; all operators that are not known are named.
    """
    try:
        return import_onnx(cfg.resolve(str(cfg.model.onnx)), _shape(cfg))
    except TraceError as error:
        raise ConfigError(f"model.{error}") from error


def preprocessing(cfg: Config) -> dict[str, Any]:
    """The size of the input, if it is an image; mean and std are not written in an ONNX file."""
    try:
        sizes = file_sizes(cfg.resolve(str(cfg.model.onnx)), _shape(cfg))
    except TraceError as error:
        raise ConfigError(f"model.{error}") from error
    return image_size(sizes)


def _shape(cfg: Config) -> Any:
    unknown = [key for key in cfg.model.args if key not in KNOWN]
    if unknown:
        raise ConfigError(f"model.args.{unknown[0]}: unknown for onnx; known: {', '.join(KNOWN)}")
    return cfg.model.args.get("shape")
