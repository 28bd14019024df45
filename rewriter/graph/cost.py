"""What a network costs: multiply-accumulates, parameters, bytes of int8 weights.

One multiply-accumulate (MAC) is one multiplication and the addition that follows it;
``torch.utils.flop_counter`` counts two operations for each, hence the division. Convolutions,
linear layers and matrix products are counted, per input (batch 1). Batch norm, activations,
pooling and element-wise operations are not.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from rewriter.graph import facts
from rewriter.graph.lookup import is_call, layers, module_of
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
    params = sum(p.numel() for p in gm.parameters())
    kept = [module_of(gm, n).weight for n in layers(gm) if not facts.KEEP_FLOAT.get(n)]
    int8 = sum({id(w): w.numel() for w in kept}.values())  # a weight may have two layers
    return Cost(_macs(gm), params, int8 + 4 * (params - int8))


# MACs of networks that were counted, by their code, modules and input shapes; plans that keep layers in float share one.
_counts: dict[str, int] = {}
MOST_COUNTS = 1000


def _macs(gm: fx.GraphModule) -> int:
    """Multiply-accumulates for one input, counted once for all networks of the same structure."""
    own = [m for m in gm.modules() if m is not gm and type(m) is not nn.Module]
    torchs = all(type(m).__module__.startswith("torch.nn.modules.") for m in own)
    if not torchs:  # what other modules compute, their names need not say
        return _counted_macs(gm)
    words = [
        gm.code,
        repr(facts.EXAMPLE.of(gm)),
        repr([tuple(t.shape) for t in gm.state_dict().values()]),
        *(f"{n} {m}" for n, m in gm.named_modules() if n),
    ]
    name = "\n".join(words)
    if name not in _counts:
        if len(_counts) >= MOST_COUNTS:
            _counts.clear()
        _counts[name] = _counted_macs(gm)
    return _counts[name]


def _counted_macs(gm: fx.GraphModule) -> int:
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
    return macs + sum(_recurrent_macs(m, x) - _counted(m, x) for m, x in calls)


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


_PRODUCTS = (torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "mm", torch.mm)


def node_macs(gm: fx.GraphModule) -> dict[str, int]:
    """MACs of every layer, matrix product and recurrent layer for one input, by node name; others have none."""
    found = layer_macs(gm)
    for node in gm.graph.nodes:
        shapes: list[Any] = [facts.SHAPE.get(n) for n in node.all_input_nodes]
        if is_call(gm, node, *RECURRENT_TYPES):
            steps = math.prod(shapes[0][:-1])
            named = module_of(gm, node).named_parameters()
            found[node.name] = steps * sum(p.numel() for name, p in named if "weight" in name)
        elif node.op in ("call_function", "call_method") and shapes and all(shapes):
            macs = _product_macs(node, shapes)
            if macs:
                found[node.name] = macs
    return found


def _product_macs(node: fx.Node, shapes: list[Any]) -> int:
    made: Any = facts.SHAPE.get(node)
    if node.target in _PRODUCTS and made:
        return math.prod(made) * shapes[0][-1]
    if node.target is torch.nn.functional.scaled_dot_product_attention:
        query, key, value = (facts.SHAPE.of(n) for n in node.args[:3])  # type: ignore[union-attr]
        return math.prod(query) * key[-2] + math.prod(query[:-1]) * key[-2] * value[-1]
    if node.target in (torch.einsum, "einsum"):
        terms, _, _ = str(node.args[0]).replace(" ", "").partition("->")
        sizes: dict[str, int] = {}
        if "." in terms:
            return 0
        given = [n for n in node.args[1:] if isinstance(n, fx.Node)] or node.all_input_nodes
        for letters, value in zip(terms.split(","), given, strict=True):
            sizes.update(zip(letters, facts.SHAPE.of(value), strict=True))
        return math.prod(sizes.values()) if "," in terms else 0
    return 0
