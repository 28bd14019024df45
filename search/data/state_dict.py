"""Find a network's weights in what training scripts save: containers, prefixes, averages, masks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

log = logging.getLogger(__name__)

# Where training scripts put the weights inside a checkpoint; averaged weights (EMA) are what is evaluated, and come first.
AVERAGED = ("state_dict_ema", "ema_state_dict", "model_ema", "params_ema", "ema_model", "ema")
PLAIN = ("state_dict", "model_state_dict", "model_state", "state", "model", "params", "module")
NAMES = ("network", "net", "weights")
STATE_KEYS = (*AVERAGED, *PLAIN, *NAMES)
# What torch.compile and pruning leave in the names of a network's own parameters.
_COMPILED = "_orig_mod."
_DEPTH = 3


def fitting_state(saved: Any, model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict in ``saved`` that fits a network best, under the network's own names.

    Looks into the usual containers (averaged weights first), takes off what stands before every name (``module.``,
    ``_orig_mod.``, ``model.``, whatever it is), applies pruning masks, and leaves out what stands beside the network
    under other prefixes, such as a loss or a second copy.

    Args:
        saved: what was read from a file.
        model: the network, with the names that are looked for.

    Returns:
        None where there is no dictionary of tensors. What it lacks or has too much is for the caller to say.
    """
    wanted = {k for k in model.state_dict() if not k.endswith("num_batches_tracked")}
    found = [(*_under_own_names(tensors, wanted), path) for path, tensors in _candidates(saved)]
    if not found:
        return None
    # the first of those that lack least: averaged weights come first
    state, prefix, path = min(found, key=lambda f: len(wanted - f[0].keys()))
    if prefix or path:
        log.info("model.weights: taken from %s%s", path, prefix)
    return state


def _candidates(
    saved: Any, path: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Dictionaries of tensors, those in known containers first, with the keys that lead to them."""
    if not isinstance(saved, Mapping) or depth > _DEPTH:
        return
    for key in STATE_KEYS:
        if isinstance(saved.get(key), Mapping):
            yield from _candidates(saved[key], f"{path}{key}.", depth + 1)
    tensors = {str(k): v for k, v in saved.items() if isinstance(v, Tensor)}
    # a checkpoint's epoch or loss may be a tensor, but its weights are not beside a container of them
    if tensors and not any(isinstance(v, Mapping) for v in saved.values()):
        yield path, _masked(tensors)


def _masked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``weight_orig * weight_mask``, as pruning stores a weight, becomes ``weight``."""
    found = dict(state)
    for key in state:
        name = key.removesuffix("_mask")
        if name != key and f"{name}_orig" in state:
            found[name] = found.pop(f"{name}_orig") * found.pop(key)
    return found


def _under_own_names(state: dict[str, Tensor], wanted: set[str]) -> tuple[dict[str, Tensor], str]:
    """The part of a state dict under the one prefix that holds most of the wanted names."""
    if not any(_COMPILED in key for key in wanted):
        state = {key.replace(_COMPILED, ""): value for key, value in state.items()}
    if wanted <= state.keys() or not wanted:
        return state, ""
    probe = max(wanted, key=len)  # long names are rare inside others
    prefixes = {
        key[: -len(name)] for name in (probe, min(wanted)) for key in state if key.endswith(name)
    }
    prefixes = {p for p in prefixes if p.endswith((".", "_"))} | {""}
    averaged = ("ema", "teacher", "averag")

    def fit(prefix: str) -> tuple[int, bool, int]:
        found = sum(f"{prefix}{name}" in state for name in wanted)
        return found, any(word in prefix.lower() for word in averaged), -len(prefix)

    prefix = max(sorted(prefixes), key=fit)
    if not prefix:
        return state, ""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, prefix
