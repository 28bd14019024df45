"""ONNX's recurrent layers as torch's, gate by gate: ONNX orders LSTM gates i o f c, torch i f c o; GRU z r h and r z n."""

from __future__ import annotations

import operator as py
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from rewriter.errors import TraceError
from rewriter.onnx_import.importer import Importer, label, operator
from rewriter.onnx_import.layers import parameter

# Position in ONNX of each gate of torch.
ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
KINDS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


@operator("LSTM", "GRU", "RNN")
def recurrent(im: Importer, node: onnx.NodeProto) -> tuple[Any, ...]:
    """A layer in either or both directions, initial states zero: (T, N, C) to (T, directions, N, hidden)."""
    kind, hidden = node.op_type, int(im.attribute(node, "hidden_size"))
    direction = im.attribute(node, "direction", "forward")
    if kind == "GRU" and not im.attribute(node, "linear_before_reset", 0):
        raise TraceError(
            f"onnx: {label(node)}: linear_before_reset = 0 is not what torch computes"
        )
    if im.attribute(node, "layout", 0) or im.attribute(node, "clip"):
        raise TraceError(f"onnx: {label(node)}: layout and clip are not supported")
    states = [node.input[i] for i in (5, 6) if im.given(node, i)]
    if any(s not in im.values.static or np.any(im.values.static[s][0]) for s in states):
        raise TraceError(f"onnx: {label(node)}: initial states other than zero are not supported")
    if im.given(node, 7):
        raise TraceError(f"onnx: {label(node)}: peepholes are not supported")
    weight, inner = im.constant(node, 1, "weight"), im.constant(node, 2, "recurrence weight")
    bias = im.constant(node, 3, "bias") if im.given(node, 3) else None
    both = direction == "bidirectional"
    keywords = (
        {"nonlinearity": "relu"}
        if kind == "RNN" and "Relu" in str(im.attribute(node, "activations"))
        else {}
    )
    layer = KINDS[kind](
        weight.shape[2], hidden, bidirectional=both, bias=bias is not None, **keywords
    )

    def sorted_gates(x: Any) -> Any:
        parts = x.reshape(len(ORDER[kind]), hidden, *x.shape[1:])
        return np.concatenate([parts[g] for g in ORDER[kind]])

    for d, suffix in enumerate(("", "_reverse")[: len(weight)]):
        setattr(layer, f"weight_ih_l0{suffix}", parameter(sorted_gates(weight[d])))
        setattr(layer, f"weight_hh_l0{suffix}", parameter(sorted_gates(inner[d])))
        if bias is not None:
            half = bias.shape[1] // 2
            setattr(layer, f"bias_ih_l0{suffix}", parameter(sorted_gates(bias[d, :half])))
            setattr(layer, f"bias_hh_l0{suffix}", parameter(sorted_gates(bias[d, half:])))
    x = im.value(node.input[0])
    if direction == "reverse":
        x = im.call(torch.flip, x, [0])
    made = im.module(layer, node, x)
    y, state = im.call(py.getitem, made, 0), im.call(py.getitem, made, 1)
    if direction == "reverse":
        y = im.call(torch.flip, y, [0])
    steps = im.shape(node.input[0])[0]
    directions = len(weight)
    y = im.method("reshape", y, steps, -1, directions, hidden)
    y = im.method("permute", y, 0, 2, 1, 3)
    if kind != "LSTM":
        return y, state
    return y, im.call(py.getitem, state, 0), im.call(py.getitem, state, 1)
