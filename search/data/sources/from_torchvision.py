"""``model: {torchvision: NAME}``: a network of torchvision, with weights from a file or fetched by torchvision."""

from __future__ import annotations

import difflib
from typing import Any

import torchvision
from torch import nn

from search.config.schema import Config, ConfigError
from search.data.user_code import blame
from search.data.weights_file import load_weights

PRETRAINED = "pretrained"


def load(cfg: Config) -> nn.Module:
    """The network, with its weights.

    Raises:
        ConfigError: torchvision knows no such network, or its weights cannot be had.
    """
    name, weights = str(cfg.model.torchvision), cfg.model.weights or PRETRAINED
    known = torchvision.models.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        version = torchvision.__version__
        raise ConfigError(f"model.torchvision: unknown to torchvision {version}: {name}{hint}")
    if weights == PRETRAINED:
        return _made(cfg, name, weights="DEFAULT")
    model = _made(cfg, name, weights=None)
    load_weights(model, cfg.resolve(weights))
    return model


def preprocessing(cfg: Config) -> dict[str, Any]:
    """How an image becomes an input, as torchvision's own weights were trained; nothing where it does not say."""
    try:
        weights = torchvision.models.get_model_weights(str(cfg.model.torchvision))
        preset: Any = weights["DEFAULT"].transforms()
    except (ValueError, KeyError):  # no such network, or one without trained weights
        return {}
    if not hasattr(preset, "crop_size"):
        return {}
    size, resized = preset.crop_size[0], preset.resize_size[0]
    return {
        "size": size,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "crop": min(1.0, size / resized),
        "interpolation": preset.interpolation.value,
    }


def _made(cfg: Config, name: str, *, weights: str | None) -> nn.Module:
    # the backbone of a detector would be fetched too, although the file replaces its weights
    own = {"weights_backbone": None} if weights is None and "rcnn" in name else {}
    try:
        return torchvision.models.get_model(name, weights=weights, **own, **cfg.model.args)
    except TypeError as error:
        raise ConfigError(f"model: args do not fit {name}: {error}") from error
    except Exception as error:
        if weights is None:
            text = f"torchvision.models.get_model({name!r}): {blame(error)}"
            raise ConfigError(f"model: {text}") from error
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ConfigError(
            f"model: {name}: the pretrained weights could not be fetched "
            f"({type(error).__name__}: {reason}); give a file instead: weights: FILE.safetensors"
        ) from error
