"""The user's network: a timm model, or a factory in the user's own code."""

from __future__ import annotations

import difflib
import logging
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from search.config.schema import Config, ConfigError
from search.data.state_dict import fitting_state
from search.data.user_code import blame, call_factory

log = logging.getLogger(__name__)


def load_model(cfg: Config) -> nn.Module:
    """The float32 network of a config, on the CPU and in eval mode.

    Raises:
        ConfigError: there is no such model, its weights cannot be had or do not fit, or the
            factory fails or returns something else.
    """
    if cfg.model.factory is not None:
        model = call_factory(cfg, "model", cfg.model.factory, cfg.model.args)
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise ConfigError(f"model: factory {cfg.model.factory}: returned no nn.Module: {kind}")
    else:
        model = _timm_model(cfg)
    return _on_cpu_in_float32(model)


def _on_cpu_in_float32(model: nn.Module) -> nn.Module:
    """Edit model: int8 is compared with float32, whatever the network is kept in."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    empty = next((name for name, t in tensors.items() if t.is_meta), None)
    if empty is not None:
        raise ConfigError(
            f"model: {empty}: on the device meta, without values; load weights first"
        )
    odd = {str(t.dtype) for t in tensors.values() if t.is_floating_point()} - {"torch.float32"}
    if odd:
        log.warning("model: has %s values: converted to float32", ", ".join(sorted(odd)))
    return model.cpu().float().eval()


def _timm_model(cfg: Config) -> nn.Module:
    name, weights = str(cfg.model.timm), cfg.model.weights or "pretrained"
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ConfigError(f"model.timm: unknown to timm {timm.__version__}: {name}{hint}")
    if weights != "pretrained":
        model = _create(cfg, name, pretrained=False)
        _load_weights(model, cfg.resolve(weights))
        return model
    return _create(cfg, name, pretrained=True)


def _create(cfg: Config, name: str, *, pretrained: bool) -> nn.Module:
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # its warning for each retry would bury the one message below
    try:
        return timm.create_model(name, pretrained=pretrained, **cfg.model.args)
    except TypeError as error:
        raise ConfigError(f"model: args do not fit {name}: {error}") from error
    except Exception as error:
        if not pretrained:
            raise ConfigError(f"model: timm.create_model({name!r}): {blame(error)}") from error
        # whatever the hub's client raises: no network, no such repository, no pretrained weights
        reason = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        )
        raise ConfigError(
            f"model: {name}: the pretrained weights could not be fetched ({reason}); "
            "give a file instead: weights: FILE.safetensors"
        ) from error
    finally:
        hub.setLevel(level)


def _load_weights(model: nn.Module, file: Path) -> None:
    """Edit model: load a state dict. Only tensors are read from a file, never code."""
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
