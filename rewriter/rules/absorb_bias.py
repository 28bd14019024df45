"""Move the constant that a channel never falls below into the biases after it.

Before: y = W2 relu(W1 x + b1) + b2
After:  y = W2 relu(W1 x + b1 - c) + (b2 + W2 c)     c (C,) >= 0

    relu(z - c) + c = relu(z)   for z >= c

c is 90 % of the smallest value that a channel takes on the calibration inputs, where that is
positive. The layers that read the value must multiply every position alike: with zero padding, a
k x k layer would miss the constant at the border, so such places are refused.

Why: a constant that all values of a channel share takes up range and carries no information, and
    equalization, which scales channels up, makes it larger.
Exact: on the calibration inputs; an input on which a channel falls below c would differ.
Cost: none.
Source: high-bias absorption, Nagel et al., 2019 (arXiv:1906.04721), section 4.1.3.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import is_call, module_of
from rewriter.graph.ops import clip_bounds, types
from rewriter.rules._model_rule import WholeModelRule
from rewriter.rules._rule import Contract, Site

ABSORBED_SHARE = 0.9
_LINEAR_ABOVE_ZERO = types(lambda row: row.pointwise and (row.homogeneous or row.clips))


class AbsorbBias(WholeModelRule):
    """All channels of the model whose values stay above zero."""

    name: ClassVar[str] = "absorb_bias"
    contract: ClassVar[Contract] = "exact"

    def problem(self, gm: fx.GraphModule) -> str:
        return "" if _places(gm) else "no channel stays above zero before layers without padding"

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        for activation, constant in _places(gm):
            maker = activation.args[0]
            assert isinstance(maker, fx.Node)
            layer: Any = module_of(gm, maker)
            layer.bias = nn.Parameter(
                _bias(layer) - constant.to(layer.weight), requires_grad=False
            )
            for node in (maker, activation):
                low, high = facts.CHANNEL_RANGE.of(node)
                facts.CHANNEL_RANGE.put(node, (low - constant.to(low), high - constant.to(high)))
            for reader in activation.users:
                _add_constant(module_of(gm, reader), constant)


def _places(gm: fx.GraphModule) -> list[tuple[fx.Node, Tensor]]:
    """Activations and the constant (C,) of each, where any is positive."""
    found: list[tuple[fx.Node, Tensor]] = []
    for node in gm.graph.nodes:
        if not is_call(gm, node, *_LINEAR_ABOVE_ZERO):
            continue
        maker, act = node.args[0], module_of(gm, node)
        known = is_call(gm, maker, nn.Conv1d, nn.Conv2d, nn.Linear) and len(maker.users) == 1
        if (
            not known
            or not facts.CHANNEL_RANGE.known(maker)
            or not facts.CHANNEL_RANGE.known(node)
        ):
            continue
        if not all(_reads_evenly(gm, user, node) for user in node.users):
            continue
        low, high = (r.double() for r in facts.CHANNEL_RANGE.of(maker))
        constant = ABSORBED_SHARE * low.clamp_min(0)
        bounds = clip_bounds(act)
        if bounds is not None:  # below the cap it is linear
            constant = torch.where(high < bounds[1], constant, 0) if bounds[0] == 0 else 0 * low
        if bool((constant > 0).any()):
            found.append((node, constant))
    return found


def _reads_evenly(gm: fx.GraphModule, reader: fx.Node, value: fx.Node) -> bool:
    if is_call(gm, reader, nn.Linear):
        return len(facts.SHAPE.of(value)) == 2
    if not is_call(gm, reader, nn.Conv1d, nn.Conv2d):
        return False
    m: Any = module_of(gm, reader)
    return m.padding == "valid" or (m.padding != "same" and not any(m.padding))


def _bias(layer: Any) -> Tensor:
    if layer.bias is not None:
        return layer.bias.detach()
    return layer.weight.new_zeros(layer.weight.shape[0])


def _add_constant(layer: Any, constant: Tensor) -> None:
    """Add what a layer makes of a constant input (C_in,) to its bias, in place."""
    weight = (
        layer.weight.detach().double().flatten(2).sum(2)
        if layer.weight.ndim > 2
        else layer.weight.detach().double()
    )
    rows = constant.view(-1, weight.shape[1])
    rows = rows.repeat_interleave(len(weight) // len(rows), 0)
    added = (weight * rows).sum(1)
    layer.bias = nn.Parameter(
        (_bias(layer).double() + added).to(layer.weight.dtype), requires_grad=False
    )
