"""What a network costs: multiply-accumulates, parameters, bytes of int8 weights.

One multiply-accumulate (MAC) is one multiplication and the addition that follows it;
``torch.utils.flop_counter`` counts two operations for each, hence the division. Convolutions,
linear layers and matrix products are counted, per input (batch 1). Batch norm, activations,
pooling and element-wise operations are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from rewriter.graph import facts
from rewriter.graph.lookup import layers, module_of
from rewriter.graph.ops import RECURRENT_TYPES


@dataclass(frozen=True)
class Cost:
    """MACs of one input, number of parameters, bytes of the weights (int8 1 byte, the rest 4)."""

    macs: int
    params: int
    weight_bytes: int


def cost(gm: fx.GraphModule) -> Cost:
    """The cost of a canonical graph for one input of the shape it was traced with.

    >>> from torch import nn, zeros
    >>> from rewriter import trace
    >>> cost(trace(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)).eval(), zeros(2, 3, 10, 10))).macs
    21600
    """
    zeros = [torch.zeros(1, *shape) for shape in facts.EXAMPLE.of(gm)]
    calls: list[tuple[nn.Module, Any]] = []
    hooks = [
        m.register_forward_hook(lambda m, args, _: calls.append((m, args[0])))
        for m in gm.modules()
        if isinstance(m, RECURRENT_TYPES)
    ]
    try:
        macs = _counted(gm, *zeros)
    finally:
        for hook in hooks:
            hook.remove()
    macs += sum(_recurrent_macs(m, x) - _counted(m, x) for m, x in calls)
    params = sum(p.numel() for p in gm.parameters())
    kept = [module_of(gm, n).weight for n in layers(gm) if not facts.KEEP_FLOAT.get(n)]
    int8 = sum({id(w): w.numel() for w in kept}.values())  # a weight may have two layers
    return Cost(macs, params, int8 + 4 * (params - int8))


def _counted(module: nn.Module, *inputs: Any) -> int:
    """What torch sees of the multiply-accumulates."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(*inputs)
    return counter.get_total_flops() // 2


def _recurrent_macs(module: nn.Module, x: Any) -> int:
    """Each step multiplies with every weight once; torch does not see fused kernels."""
    rows = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
    steps = rows.numel() // rows.shape[-1]
    return steps * sum(p.numel() for name, p in module.named_parameters() if "weight" in name)


def layer_macs(gm: fx.GraphModule) -> dict[str, int]:
    """MACs of every weighted layer for one input, by node name."""
    found: dict[str, int] = {}
    for node in layers(gm):
        m, shape = module_of(gm, node), facts.SHAPE.of(node)
        if isinstance(m, nn.ConvTranspose2d):
            (source,) = node.all_input_nodes
            places = math.prod(facts.SHAPE.of(source)) // m.in_channels
            found[node.name] = places * m.weight.numel()
        else:
            channels = m.out_features if isinstance(m, nn.Linear) else m.out_channels
            found[node.name] = math.prod(shape) // channels * m.weight.numel()
    return found
