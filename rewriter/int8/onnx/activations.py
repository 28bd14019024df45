"""Activations as the int8 kernels of ONNX Runtime compute them, where a float island would take several times as long.

Between a quantizer on either side, an activation without an int8 kernel runs in float: three to four passes over floats, which
are four times as wide. Three of them are sums and products of what has kernels:

* hard sigmoid: x / 6 + 1/2 is a sum with a number, the first scale divided by 6, and saturation clips it to [0, 1]. One rounding,
  as in the island.
* hardswish and SiLU: x g(x), where the gate g is an int8 value of its own. Its scale is that of the range that g has over the
  range of x, so that where the gate is exact, at its ends, the product is too; see `rewriter.int8.simulate.GatedActivation`,
  which rounds the gate likewise.

What else was measured, and is slower or gives other numbers: a table as Gather (four times the island), HardSwish as one float
operator (nine tenths of it), leaky ReLU as a sum of max(x, 0) and x (a quarter faster than the runtime's table, but with two
roundings of the products before that of the sum).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx, nn

from rewriter.graph import facts
from rewriter.int8.onnx.arguments import source_of
from rewriter.int8.onnx.builder import Emission, Value
from rewriter.int8.onnx.clips import is_saturated

# Of H x W, from which repeating a gate pays for the operator that does it.
LEAST_PLACES = 512


def silu(e: Emission, node: fx.Node, m: nn.SiLU) -> Value:
    del m
    x = e.read(source_of(node), node)
    return e.op("Mul", x, _gate(e, node, e.op("Sigmoid", x)))


def hardswish(e: Emission, node: fx.Node, m: nn.Hardswish) -> Value:
    del m
    x = e.read(source_of(node), node)
    if e.quantized is None or not e.note(node).inner:
        return e.op("Mul", x, e.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))
    return e.op("Mul", x, _gate(e, node, _shifted_sixth(e, x)))


def hard_sigmoid(e: Emission, node: fx.Node, m: nn.Hardsigmoid) -> Value:
    del m
    x = e.read(source_of(node), node)
    if _reads_and_writes_int8(e, node) and is_saturated(e, node, 0.0, 1.0):
        return _shifted_sixth(e, x)
    return e.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


def spread_gate(e: Emission, gate: fx.Node, node: fx.Node, x: fx.Node) -> str:
    """A gate (N, C, 1, 1) as the product ``node`` of it with ``x`` (N, C, H, W) reads it: repeated over the width where that is faster.

    Channels come last in the layout of the int8 kernels, and a product that is broadcast walks over each place apart; of a
    gate repeated over a row it walks over rows. The values are the same.
    """
    read = e.read(gate, node)
    if e.quantized is None or nn.Hardswish not in e.quantized.scheme.inner_values:
        return read
    shape, places = facts.SHAPE.of(gate), facts.SHAPE.of(x)[2:]
    both = gate.name in e.note(node).reads and x.name in e.note(node).reads
    if not both or len(shape) != 4 or shape[2:] != (1, 1) or math.prod(places) < LEAST_PLACES:
        return read
    stored, scale, zero = e.stored_behind(read)
    repeated = e.op("Expand", stored, e.ints([1, shape[1], 1, places[1]]))
    return _under_scale(e, repeated, scale, zero)


def _gate(e: Emission, node: fx.Node, gate: str) -> str:
    """The gate through its int8 form, where the target's kernels take two steps."""
    if e.quantized is None or not e.note(node).inner:
        return gate
    return e.rounded_to(gate, e.quantized.gate_params(node), node)


def _shifted_sixth(e: Emission, x: str) -> str:
    """A sixth of an int8 value, plus 1/2; saturation of what it is rounded to clips it."""
    stored, scale, zero = e.stored_behind(x)
    sixth = _under_scale(e, stored, scale / np.float32(6), zero)
    return e.op("Add", sixth, e.number_in_int8(0.5, e.integer_kind(x)))


def _under_scale(e: Emission, stored: str, scale: Any, zero: str) -> str:
    """Stored integers as the numbers that they are under another scale."""
    constant = e.constant(np.array(scale, dtype=np.float32), "step")
    return e.op("DequantizeLinear", stored, constant, zero)


def _reads_and_writes_int8(e: Emission, node: fx.Node) -> bool:
    """Whether ONNX Runtime's 8-bit kernels are meant, and every reader takes the int8 form."""
    if e.quantized is None or nn.Hardswish not in e.quantized.scheme.inner_values:
        return False
    if e.note(node).output is None or source_of(node).name not in e.note(node).reads:
        return False
    kept = node in e.exposed or bool(facts.KEEP_FLOAT.get(node))
    return not kept and all(node.name in e.note(user).reads for user in node.users)
