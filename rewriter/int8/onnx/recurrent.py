"""Recurrent layers in ONNX, in float, straight from the module's weights.

torch and ONNX store the gates in another order (torch: GRU reset, update, new; LSTM input, forget, cell, output), and
ONNX has one operator for each layer and keeps the directions apart. A cell is a layer run for one step. The time
axis stays free, and so does the batch.
Source: the ONNX operators RNN, GRU and LSTM, version 14.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriter.int8.onnx.arguments import first, rank
from rewriter.int8.onnx.builder import Emission, UnsupportedError, Value

# ONNX gate -> torch gate
_GATES = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}


def _layer(e: Emission, node: fx.Node, m: Any) -> Value:
    if m.proj_size:
        raise UnsupportedError("a projected hidden state")
    if rank(first(node)) != 3:
        raise UnsupportedError("a sequence without a batch")
    kind, x, given = _kind(m), e.read(first(node), node), _states(e, node)
    directions = 2 if m.bidirectional else 1
    if m.batch_first:
        x = e.op("Transpose", x, perm=[1, 0, 2])
    last: list[list[str]] = [[] for _ in range(2 if kind == "LSTM" else 1)]
    for layer in range(m.num_layers):
        suffixes = [f"_l{layer}", f"_l{layer}_reverse"][:directions]
        start = [_part(e, s, layer * directions, directions, m.num_layers) for s in given]
        y, *after = _step(e, m, kind, x, suffixes, start)
        for kept, value in zip(last, after, strict=True):
            kept.append(value)
        # (T, D, N, H) -> (T, N, D * H)
        x = e.op("Transpose", y, perm=[0, 2, 1, 3])
        x = e.op("Reshape", x, e.ints([0, 0, directions * m.hidden_size]))
    out = e.op("Transpose", x, perm=[1, 0, 2]) if m.batch_first else x
    ends = [v[0] if len(v) == 1 else e.op("Concat", *v, axis=0) for v in last]
    return (out, ends[0]) if len(ends) == 1 else (out, tuple(ends))


def _cell(e: Emission, node: fx.Node, m: Any) -> Value:
    if rank(first(node)) != 2:
        raise UnsupportedError("a step without a batch")
    kind, x, front = _kind(m), e.read(first(node), node), e.ints([0])
    start = [e.op("Unsqueeze", s, front) for s in _states(e, node)]
    _, *after = _step(e, m, kind, e.op("Unsqueeze", x, front), [""], start)
    ends = [e.op("Squeeze", value, front) for value in after]
    return ends[0] if len(ends) == 1 else tuple(ends)


def _kind(m: nn.Module) -> str:
    return type(m).__name__.removesuffix("Cell")


def _states(e: Emission, node: fx.Node) -> list[str]:
    """The initial states that the call is given; none: zeros."""
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("hx")
    if given is None:
        return []
    if isinstance(given, fx.Node) and isinstance(e.values[given], tuple):
        return [str(name) for name in e.values[given]]
    found: Sequence[fx.Node] = given if isinstance(given, (tuple, list)) else (given,)
    if any(rank(s) != rank(first(node)) for s in found):
        raise UnsupportedError("an initial state without a batch")
    return [e.read(s) for s in found]


def _part(e: Emission, state: str, start: int, count: int, layers: int) -> str:
    """The rows of a state (layers * directions, N, H) that belong to one layer."""
    if layers == 1:
        return state
    return e.op("Slice", state, e.ints([start]), e.ints([start + count]), e.ints([0]))


def _step(
    e: Emission, m: Any, kind: str, x: str, suffixes: Sequence[str], start: Sequence[str]
) -> tuple[str, ...]:
    """One layer, (T, N, I) -> y (T, D, N, H), last h (D, N, H), and for an LSTM last c."""
    weights = [
        e.constant(
            np.stack([_gates(getattr(m, f"weight_{place}{s}"), kind) for s in suffixes]), place
        )
        for place in ("ih", "hh")
    ]
    bias = ""
    if m.bias:
        both = [
            np.concatenate(
                [_gates(getattr(m, f"bias_{place}{s}"), kind) for place in ("ih", "hh")]
            )
            for s in suffixes
        ]
        bias = e.constant(np.stack(both), "bias")
    attributes: dict[str, Any] = {"hidden_size": m.hidden_size}
    if len(suffixes) == 2:
        attributes["direction"] = "bidirectional"
    if kind == "GRU":
        attributes["linear_before_reset"] = 1
    if kind == "RNN":
        attributes["activations"] = [m.nonlinearity.capitalize()] * len(suffixes)
    states = ["", *start] if start else []
    outputs = 3 if kind == "LSTM" else 2
    return e.op_many(kind, [x, *weights, bias, *states], outputs, **attributes)


def _gates(value: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """A weight or bias with its gates in ONNX's order."""
    parts = value.detach().cpu().chunk(len(_GATES[kind]))
    return torch.cat([parts[i] for i in _GATES[kind]]).numpy()


RECURRENT: dict[type[nn.Module], Callable[[Emission, fx.Node, Any], Value]] = {
    **dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), _layer),
    **dict.fromkeys((nn.RNNCell, nn.GRUCell, nn.LSTMCell), _cell),
}
