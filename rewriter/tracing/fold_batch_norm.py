"""Batch norm folded into the layer before it.

    y = (W x + b - mean) * s + shift,  s = gain / sqrt(var + eps)      =      (s W) x + (b -
    mean) * s + shift

with s along the output channels. In float64: folding in float32 costs a digit for each layer of
a deep network. Pair by pair, and only where the layer feeds nothing else:
``torch.fx.experimental.optimization.fuse`` silently corrupts a convolution that two batch norms
share, and torch folds a grouped transposed convolution along the wrong axis. Source: Jacob et
al., 2018 (arXiv:1712.05877), section 3.2.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import is_call, module_of
from rewriter.graph.ops import LAYER_TYPES


def fold_batch_norms(gm: fx.GraphModule) -> None:
    """Fold every batch norm that has a layer of its own before it; edits gm in place."""
    for node in list(gm.graph.nodes):
        if not is_call(gm, node, nn.BatchNorm1d, nn.BatchNorm2d):
            continue
        before, bn = node.args[0], module_of(gm, node)
        if not is_call(gm, before, *LAYER_TYPES) or len(before.users) != 1:
            continue
        layer = module_of(gm, before)
        # with three dimensions, the channels of a batch norm are dimension 1, those of a linear
        # layer dimension 2
        turned = isinstance(layer, nn.Linear) and len(facts.SHAPE.of(before)) != 2
        if bn.running_var is None or turned:
            continue
        gm.set_submodule(str(before.target), folded(layer, bn))
        node.replace_all_uses_with(before)
        gm.graph.erase_node(node)


def folded(layer: Any, bn: Any) -> Any:
    """A copy of ``layer`` that computes bn(layer(x))."""
    mean, var = bn.running_mean.double(), bn.running_var.double()
    s = (var + bn.eps).rsqrt()
    if bn.weight is not None:
        s = s * bn.weight.detach().double()
    shift = torch.zeros_like(s) if bn.bias is None else bn.bias.detach().double()
    bias = torch.zeros_like(s) if layer.bias is None else layer.bias.detach().double()
    new, dtype = copy.deepcopy(layer), layer.weight.dtype
    weight = _scaled(layer, layer.weight.detach().double(), s)
    new.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    new.bias = nn.Parameter(((bias - mean) * s + shift).to(dtype), requires_grad=False)
    return new


def _scaled(layer: Any, weight: Tensor, s: Tensor) -> Tensor:
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight * s.view(-1, *[1] * (weight.ndim - 1))
    # (C_in, C_out / groups, ...): output channel c of group g is entry [inputs of g, c]
    g = layer.groups
    grouped = weight.view(g, weight.shape[0] // g, *weight.shape[1:])
    return (grouped * s.view(g, 1, -1, *[1] * (weight.ndim - 2))).view_as(weight)
