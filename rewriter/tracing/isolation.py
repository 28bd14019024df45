"""What is kept from the user's code while it is traced: autograd, and traces left in the modules."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from rewriter.tracing.proxy import proxies

# What torch itself keeps in a module.
_TORCHS = ("_parameters", "_buffers", "_modules", "training")


class _Context:
    """Stands where ``forward`` of an autograd function expects somewhere to leave things."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs

    def ignored(self, *args: Any) -> None:
        pass

    save_for_backward = save_for_forward = mark_dirty = ignored
    mark_non_differentiable = set_materialize_grads = ignored


@contextmanager
def without_autograd() -> Generator[None]:
    """While tracing, an autograd function is its ``forward``, written in Python.

    Torch's own ``apply`` takes symbols for tensors and crashes; activation checkpoints use it.
    """
    plain = Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not proxies((args, kwargs)):
            return plain.__func__(cls, *args, **kwargs)
        if cls.setup_context is not Function.setup_context:
            return cls.forward(*args, **kwargs)
        return cls.forward(_Context(len(args)), *args, **kwargs)

    Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        with torch.no_grad():
            yield
    finally:
        Function.apply = plain  # type: ignore[method-assign]


@contextmanager
def attributes_kept(model: nn.Module) -> Generator[None]:
    """Undo what a forward writes into its modules, such as the grid of the last input's size."""
    before = [(m, _attributes(m)) for m in model.modules()]
    try:
        yield
    finally:
        for module, known in before:
            for name in [n for n in vars(module) if n not in known]:
                # constants that the trace found are attributes of the model from here on
                if name not in _TORCHS and not name.startswith("_tensor_constant"):
                    del vars(module)[name]
            vars(module).update(known)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes that are no parameter, buffer or module; lists and dicts as they are now."""
    return {
        name: copy.copy(value) if type(value) in (list, dict) else value
        for name, value in vars(module).items()
        if name not in _TORCHS
    }
