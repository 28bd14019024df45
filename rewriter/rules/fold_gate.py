"""A gate that hardly varies -> its mean, in the weights of the layer that reads the product.

Before: g = sigmoid(layer(ReLU(layer(mean x)))); y = reader(x g)
After:  y = reader'(x)

    W'[:, c] = m_c W[:, c]     m (C,): the middle of what channel c's gate takes on calibration inputs

The reader is then found again by least squares on x (``rewriter.fitting.activations``), and moved with
the layers behind it by a few gradient steps.

Why: the gate, its mean and both layers are rounded in int8, and an error there multiplies a whole
    channel; where the gate of an image is nearly that of any other there is nothing to gate.
Exact: no; blocked where the gates vary.
Cost: fewer MACs by those of the gate, and half a dozen kernel calls less.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.channel_ranges import range_of
from rewriter.graph.lookup import find, is_call, module_of
from rewriter.rules._rule import Contract, RewriteRule, Site, mark
from rewriter.surgery.gates import Gated, gates

# The gates of half of the channels may span at most this share of the largest gate.
MOST_SPREAD = 0.35


class FoldGate(RewriteRule):
    """One site for each gate whose product only one layer reads, at the gate's first layer."""

    name: ClassVar[str] = "fold_gate"
    contract: ClassVar[Contract] = "approximate"
    in_graph_order: ClassVar[bool] = True

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for gated in gates(gm):
            layers = gated.layers(gm)
            rest = [n for n in gated.chain if n not in layers]
            readers = list(gated.product.users)
            blocked = self._problem(gm, gated, readers)
            known = [n for n in readers if n.op == "call_module"]
            yield self.site(*layers, *rest, gated.product, blocked=blocked, readers=known)

    def _problem(self, gm: fx.GraphModule, gated: Gated, readers: list[fx.Node]) -> str:
        if len(gated.gate.users) != 1:
            return f"the gate {gated.gate.name} is read by {len(gated.gate.users)} nodes"
        if len(readers) != 1 or not is_call(gm, readers[0], nn.Conv2d):
            return f"not one convolution alone reads {gated.product.name}"
        if module_of(gm, readers[0]).groups != 1:
            return f"{readers[0].name} has groups"
        gate = range_of(gated.gate, facts.SHAPE.of(gated.gate)[1])
        if gate is None:
            return "no calibrated channel ranges"
        low, high = gate
        spread = float((high - low).median() / high.abs().max().clamp_min(1e-12))
        if spread > MOST_SPREAD:
            return f"the gate varies: half of its channels span {spread:.0%} of the largest"
        return ""

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        gated = next(g for g in gates(gm) if g.product.name in site.nodes)
        (reader,) = gated.product.users
        low, high = facts.CHANNEL_RANGE.of(gated.gate)
        layer = copy.deepcopy(module_of(gm, reader))
        weight = layer.weight.detach()
        middle = ((low + high) / 2).to(weight)
        layer.weight = nn.Parameter(weight * middle.view(1, -1, 1, 1), requires_grad=False)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(len(weight)).to(weight), requires_grad=False)
        gm.set_submodule(str(reader.target), layer)
        gated.product.replace_all_uses_with(gated.value)
        gm.graph.eliminate_dead_code()
        mark(reader, site)

    def apply_fitted(self, gm: fx.GraphModule, site: Site, state: Mapping[str, Tensor]) -> bool:
        self.apply(gm, site)
        for path, value in state.items():
            owner, _, name = path.rpartition(".")
            layer = module_of(gm, find(gm, owner))
            setattr(layer, name, nn.Parameter(value.to(layer.weight), requires_grad=False))
        return True
