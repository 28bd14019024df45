"""``model: {timm: NAME}``: a network of timm, with weights from a file or fetched by timm."""

from __future__ import annotations

import difflib
import logging
from typing import Any

import timm
from timm.data.config import resolve_data_config
from torch import nn

from search.config.schema import Config, ConfigError
from search.data.user_code import blame
from search.data.weights_file import load_weights

PRETRAINED = "pretrained"


def load(cfg: Config) -> nn.Module:
    """The network, with its weights.

    Raises:
        ConfigError: timm knows no such network, or its weights cannot be had.
    """
    name, weights = str(cfg.model.timm), cfg.model.weights or PRETRAINED
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ConfigError(f"model.timm: unknown to timm {timm.__version__}: {name}{hint}")
    if weights != PRETRAINED:
        model = _create(cfg, name, pretrained=False)
        load_weights(model, cfg.resolve(weights))
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


def preprocessing(cfg: Config) -> dict[str, Any]:
    """How an image becomes an input, as the network was trained; nothing where timm does not say."""
    name = str(cfg.model.timm)
    if not timm.is_model(name):
        return {}
    pretrained = timm.get_pretrained_cfg(name)
    resolved = resolve_data_config(
        dict(cfg.model.args), pretrained_cfg=pretrained.to_dict() if pretrained else {}
    )
    return {
        "size": resolved["input_size"][-1],
        "mean": resolved["mean"],
        "std": resolved["std"],
        "crop": resolved["crop_pct"],
        "interpolation": resolved["interpolation"],
        "crop_mode": resolved["crop_mode"],
    }
