"""Clips that saturation of the int8 value behind them carries out."""

from __future__ import annotations

import math

import numpy as np
from torch import fx

from rewriter.graph.lookup import module_of
from rewriter.graph.ops import clip_bounds
from rewriter.int8.onnx.builder import Emission, integer_type


def clip_is_free(e: Emission, node: fx.Node) -> bool:
    """Whether a clip may be left out because the quantizer behind it saturates in the same places.

    ONNX Runtime finds this only where the float bounds fit exactly; a clip that is left keeps the
    convolution before it in float.
    """
    if e.quantized is None or node.op != "call_module":
        return False
    bounds = clip_bounds(module_of(e.gm, node))
    if bounds is None or e.note(node).output is None or node in e.exposed or e.note(node).reads:
        return False
    if not all(node.name in e.note(user).reads for user in node.users):
        return False
    return is_saturated(e, node, *bounds)


def is_saturated(e: Emission, node: fx.Node, low: float, high: float) -> bool:
    """Whether the quantizer of a node's value cuts off at least what lies outside of [low, high]."""
    scale, zero, spec = e.value_params(node)
    # QuantizeLinear saturates at the type's own bounds
    limits = np.iinfo(integer_type(spec))
    least, most = int(limits.min), int(limits.max)
    return round(low / scale) + zero <= least and (
        high == math.inf or round(high / scale) + zero >= most
    )
