"""What a network costs: multiply-accumulates, parameters, bytes of int8 weights.

One multiply-accumulate (MAC) is one multiplication and the addition that follows it; ``torch.utils.flop_counter`` counts
two operations for each, hence the division. Convolutions, linear layers and matrix products are
counted, per input (batch 1). Batch norm, activations, pooling and element-wise operations are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from rewriter.graph import RECURRENT_TYPES, is_call, layers, module_of


@dataclass(frozen=True)
class Cost:
    """MACs of one input, number of parameters, and bytes of the weights (int8 layers 1 byte, the rest 4)."""

    macs: int
    params: int
    weight_bytes: int


def cost(gm: fx.GraphModule) -> Cost:
    """The cost of a canonical graph for one input of the shape it was traced with."""
    zeros = [torch.zeros(1, *shape) for shape in gm.meta["example"]]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        gm(*zeros)
    macs = counter.get_total_flops() // 2 + _recurrent_macs(gm)
    params = sum(p.numel() for p in gm.parameters())
    int8 = sum(module_of(gm, n).weight.numel() for n in layers(gm) if not n.meta.get("keep_float"))
    return Cost(macs, params, int8 + 4 * (params - int8))


def layer_macs(gm: fx.GraphModule) -> dict[str, int]:
    """MACs of every weighted layer for one input, by node name."""
    found: dict[str, int] = {}
    for node in layers(gm):
        m, shape = module_of(gm, node), node.meta["shape"]
        if isinstance(m, nn.ConvTranspose2d):
            places = math.prod(node.args[0].meta["shape"]) // m.in_channels
            found[node.name] = places * m.weight.numel()
        else:
            channels = m.out_features if isinstance(m, nn.Linear) else m.out_channels
            found[node.name] = math.prod(shape) // channels * m.weight.numel()
    return found


def _recurrent_macs(gm: fx.GraphModule) -> int:
    """The flop counter does not see inside the fused RNN kernels: count their matrix products here."""
    total = 0
    for node in gm.graph.nodes:
        if is_call(gm, node, *RECURRENT_TYPES):
            m = module_of(gm, node)
            source = node.args[0].meta["shape"]
            steps = math.prod(source[:-1])
            weights = [p.numel() for name, p in m.named_parameters() if "weight" in name]
            total += steps * sum(weights)
    return total
