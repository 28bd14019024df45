"""A network's weights, from a file of tensors."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from search.config.schema import ConfigError
from search.data.state_dict import fitting_state


def load_weights(model: nn.Module, file: Path) -> None:
    """Edit model: load a state dict. Only tensors are read from a file, never code.

    Raises:
        ConfigError: the file cannot be read, or does not fit the model.
    """
    if not file.is_file():
        raise ConfigError(f"model.weights: no such file: {file}")
    try:
        if file.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(file)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old pickles, which are refused below
                state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found.group(1)})" if found else ""
        fact = f"holds code or objects{what}, not only tensors: refused, as loading would run it"
        raise ConfigError(f"model.weights: {file}: {fact}; save model.state_dict()") from error
    except Exception as error:  # a damaged file makes the readers raise whatever they meet first
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        fact = f"not readable as a file of tensors: {first}; save model.state_dict()"
        raise ConfigError(f"model.weights: {file}: {fact}") from error
    state = fitting_state(state, model)
    if state is None:
        raise ConfigError(f"model.weights: {file}: holds no state dict")
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        fact = " ".join(str(error).split())
        raise ConfigError(f"model.weights: {file.name} does not fit the model: {fact}") from error
    missing = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    for what, keys in (("lacks", missing), ("has unknown", result.unexpected_keys)):
        if keys:
            named = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ConfigError(f"model.weights: {file.name} does not fit the model: {what} {named}")
