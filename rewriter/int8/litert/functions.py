"""Which emitter writes a call of a function or method for LiteRT."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from rewriter.int8.litert.arithmetic import ARITHMETIC, Emitter
from rewriter.int8.litert.data_movement import MOVES

_NAMED: dict[str, Emitter] = ARITHMETIC | MOVES


def _functions() -> dict[Any, Emitter]:
    """The callables of torch and operator with these names; a user's namesake is none of them."""
    found: dict[Any, Emitter] = {}
    for place in (nn.functional, torch, operator):
        for name, emitter in _NAMED.items():
            function = getattr(place, name, None)
            if callable(function) and not isinstance(function, type):
                found[function] = emitter
    return found


_BY_FUNCTION = _functions()


def function_emitter(node: fx.Node) -> Emitter | None:
    """The emitter of a ``call_function`` or ``call_method`` node, None if there is none."""
    if node.op == "call_method":
        return _NAMED.get(str(node.target))
    return _BY_FUNCTION.get(node.target)
