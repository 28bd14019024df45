"""Take off what stands around a network or its weights: wrappers, hooks, parametrizations.

None of it changes what the network computes in eval mode, but symbolic tracing and folding see
through none of it: a compiled module has no forward of its own, and a pruned or normalized weight
is computed anew by a hook before each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

# Class of the wrapper and the attribute that holds the network: ``torch.compile``, copies for several devices, averages of
# the weights (torch's and timm's). By name, since importing some of them costs seconds.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "ModelEma": "ema",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
}
_WRITERS = ("torch.", "timm.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside its wrappers; nothing is changed.

    >>> unwrapped(nn.DataParallel(nn.ReLU()))
    ReLU()
    """
    while isinstance(inner := _inside(model), nn.Module):
        model = inner
    return model


def unwrap_parts(model: nn.Module) -> None:
    """Replace every wrapped sub-module of a network by what the wrapper holds, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _inside(child) is not None:
                setattr(module, name, unwrapped(child))


def _inside(module: nn.Module) -> Any:
    kind = type(module)
    if not kind.__module__.startswith(_WRITERS):
        return None
    return getattr(module, _WRAPPERS.get(kind.__name__, ""), None)


def plain_weights(module: nn.Module) -> None:
    """Replace a weight that is computed anew for each call by what it comes to, in place.

    Those are weight and spectral normalization, pruning masks and other parametrizations.
    """
    if parametrize.is_parametrized(module):
        # torch's own removal would change the class, which the copy shares with the user's module
        names = list(module.parametrizations)  # type: ignore[arg-type]
        weights = {name: getattr(module, name).detach().clone() for name in names}
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, weight in weights.items():
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    hooks: dict[int, Any] = vars(module)["_forward_pre_hooks"]
    for key, hook in list(hooks.items()):
        if isinstance(hook, BasePruningMethod):
            hook.remove(module)  # type: ignore[no-untyped-call]
            name: str = vars(hook)["_tensor_name"]
        elif type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
            with torch.no_grad():
                hook(module, ())
                hook.remove(module)  # type: ignore[union-attr]
            name = hook.name
        else:
            continue
        del hooks[key]
        getattr(module, name).requires_grad_(False)
