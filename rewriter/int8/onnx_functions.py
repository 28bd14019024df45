"""Which functions and methods of a canonical graph can be written in ONNX."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from rewriter.int8.onnx_arithmetic import ARITHMETIC, Emitter
from rewriter.int8.onnx_moves import MOVES

_EMITTERS = ARITHMETIC | MOVES


def _functions() -> dict[Any, Emitter]:
    """The callables of torch and operator with these names; a user's namesake is none of them."""
    named: dict[Any, Emitter] = {getattr: _EMITTERS["getattr"]}
    for place in (nn.functional, torch, torch.special, operator):
        for name, emitter in _EMITTERS.items():
            function = getattr(place, name, None)
            if callable(function) and not isinstance(function, type):
                named[function] = emitter
    return named


_BY_FUNCTION = _functions()


def function_emitter(node: fx.Node) -> Emitter | None:
    """The emitter of a ``call_function`` or ``call_method`` node, None if there is none."""
    if node.op == "call_method":
        return _EMITTERS.get(str(node.target))
    return _BY_FUNCTION.get(node.target)
