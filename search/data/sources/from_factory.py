"""``model: {factory: "module:callable"}``: a network that the user's own code makes."""

from __future__ import annotations

from torch import nn

from search.config.schema import Config, ConfigError
from search.data.user_code import call_factory


def load(cfg: Config) -> nn.Module:
    """What the factory returns.

    Raises:
        ConfigError: it cannot be called, fails, or returns something else than a network.
    """
    name = str(cfg.model.factory)
    model = call_factory(cfg, "model", name, cfg.model.args)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ConfigError(f"model: factory {name}: returned no nn.Module: {kind}")
    return model
