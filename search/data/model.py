"""The network of a run, wherever it comes from, as everything else expects it."""

from __future__ import annotations

import logging

from torch import nn

from search.config.schema import Config, ConfigError
from search.data.sources import load_source

log = logging.getLogger(__name__)


def load_model(cfg: Config) -> nn.Module:
    """The float32 network of a config, on the CPU and in eval mode.

    Raises:
        ConfigError: there is no such model, its weights cannot be had or do not fit, or the
            factory fails or returns something else.
    """
    return on_cpu_in_float32(load_source(cfg))


def on_cpu_in_float32(model: nn.Module) -> nn.Module:
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
