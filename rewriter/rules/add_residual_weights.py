"""Weights that int8 holds badly -> what int8 holds of them, and the rest, as two layers that are added.

Before: x -> layer W -> y
After:  x -> layer W_hi -> + -> y
        x -> layer W_lo ---^

    W_hi = scale * round(W / scale)      W_lo = W - W_hi, |W_lo| <= scale / 2, with a scale of its own

The steps of W_lo are 255 times as fine, so that both together hold W to about 16 bits. Where scales change later
(equalization), what is left over is computed anew before the int8 ranges are measured (``facts.RESIDUAL_OF``).

Why: one weight scale for a layer leaves its narrow channels with a few levels, and a single large
    weight does so to its channel, as in stems, re-parameterized kernels and layers with folded
    batch norms of very different sizes.
Exact: yes.
Cost: the MACs of the layer once more, and an addition.
Source: residual expansion of weights, Yvinec et al., 2023 (REx, arXiv:2203.14645).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Set
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import add_module
from rewriter.graph.lookup import find, is_call, module_of
from rewriter.int8.annotate import is_decoding, notes_of
from rewriter.int8.integer_grid import dequantized_weight
from rewriter.int8.scheme import QuantScheme, QuantSpec, channel_axis, weight_scale
from rewriter.rules._rule import Contract, RewriteRule, Site, mark

# The relative error of an output channel's weights from which a second layer is offered.
LEAST_ERROR = 0.01
_DIVIDED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_PER_CHANNEL = QuantSpec(symmetric=True, signed=True, ch_axis=0)


class AddResidualWeights(RewriteRule):
    """One site for each layer, a near miss where int8 holds its weights well."""

    name: ClassVar[str] = "add_residual_weights"
    contract: ClassVar[Contract] = "exact"
    stage: ClassVar[Literal["replace", "split", "thin", "resize"]] = "split"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        return (self._site(gm, n) for n in gm.graph.nodes if _may_be_divided(gm, n))

    def site_at(self, gm: fx.GraphModule, anchor: str) -> Site | None:
        node = next((n for n in gm.graph.nodes if n.name == anchor), None)
        return self._site(gm, node) if node is not None and _may_be_divided(gm, node) else None

    def near(self, gm: fx.GraphModule, names: Set[str]) -> Iterator[Site]:
        found = (n for n in gm.graph.nodes if n.name in names and _may_be_divided(gm, n))
        return (self._site(gm, n) for n in found)

    def _site(self, gm: fx.GraphModule, node: fx.Node) -> Site:
        return self.site(node, blocked=self._problem(gm, node))

    def _problem(self, gm: fx.GraphModule, node: fx.Node) -> str:
        if facts.KEEP_FLOAT.get(node):
            return "the layer is in float"
        if facts.RESIDUAL_OF.known(node):
            return "it is what is left over of another layer"
        error = worst_error(module_of(gm, node), weight_spec(gm, node))
        if error < LEAST_ERROR:
            return f"int8 holds the weights of every channel to {error:.1%}"
        return ""

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        node = find(gm, site.anchor)
        layer = module_of(gm, node)
        high, low = split_weights(layer, weight_spec(gm, node))
        gm.set_submodule(str(node.target), high)
        users = list(node.users)
        in_float = _read_in_float(gm, node)
        with gm.graph.inserting_after(node):
            rest = gm.graph.call_module(add_module(gm, f"{node.target}_rest", low), node.args)
        with gm.graph.inserting_after(rest):
            total = gm.graph.call_function(operator.add, (node, rest))
        for new in (rest, total):
            facts.inherit(new, node)
            mark(new, site)
        if in_float:
            facts.KEEP_FLOAT.put(total, True)
            facts.READS_FLOAT.put(total, True)
        facts.CHANNEL_RANGE.drop(rest)
        mark(node, site)
        for user in users:
            user.replace_input_with(node, total)
        facts.RESIDUAL_OF.put(rest, node.name)


def _may_be_divided(gm: fx.GraphModule, node: fx.Node) -> bool:
    return is_call(gm, node, *_DIVIDED) and not is_decoding(gm, node)


def _read_in_float(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a layer's kernel writes floats, which nothing reads in int8: both parts are then added in float."""
    scheme: QuantScheme | None = facts.SCHEME.get(gm)
    if scheme is None:
        return False
    notes = notes_of(gm, scheme)
    return notes[node].output is None and all(notes[u].output is None for u in node.users)


def weight_spec(gm: fx.GraphModule, node: fx.Node) -> QuantSpec:
    """How the target stores the weights of a layer; a scale for each channel where no target is known."""
    scheme: QuantScheme | None = facts.SCHEME.get(gm)
    if scheme is None:
        return _PER_CHANNEL
    return scheme.linear_weights if is_call(gm, node, nn.Linear) else scheme.weights


def rounded(layer: nn.Module, spec: QuantSpec) -> Tensor:
    """The weights of a layer as int8 holds them."""
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    axis = channel_axis(layer, spec)
    return dequantized_weight(weight, weight_scale(weight, spec, axis).to(weight), spec, axis)


def worst_error(layer: nn.Module, spec: QuantSpec) -> float:
    """The largest relative error, over the output channels, of weights in int8."""
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    missing = (weight - rounded(layer, spec)).double()
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    rest = [d for d in range(weight.ndim) if d != axis]
    power = weight.double().square().sum(rest)
    share = missing.square().sum(rest) / power.clamp_min(1e-300)
    # a channel that makes next to nothing does no harm whatever becomes of it
    live = power > 1e-8 * power.max()
    return float(share[live].max().sqrt()) if bool(live.any()) else 0.0


def split_weights(layer: nn.Module, spec: QuantSpec) -> tuple[nn.Module, nn.Module]:
    """The layer with the weights that int8 holds, and one with what is left over and no bias."""
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    high, low = copy.deepcopy(layer), copy.deepcopy(layer)
    kept = rounded(layer, spec)
    high.weight = nn.Parameter(kept.clone(), requires_grad=False)
    low.weight = nn.Parameter(weight - kept, requires_grad=False)
    low.register_parameter("bias", None)
    return high.eval(), low.eval()


def settle_residuals(gm: fx.GraphModule) -> None:
    """Divide the weights of each pair anew, in place, where a later rule has scaled them."""
    by_name = {n.name: n for n in gm.graph.nodes}
    for node in list(gm.graph.nodes):
        name = facts.RESIDUAL_OF.get(node)
        first = None if name is None else by_name.get(name)
        if first is None or not is_call(gm, first, type(module_of(gm, node))):
            continue
        layer, rest = module_of(gm, first), module_of(gm, node)
        if layer.weight.shape != rest.weight.shape:
            continue
        spec = weight_spec(gm, first)
        whole = copy.deepcopy(layer)
        with torch.no_grad():
            whole.weight.add_(rest.weight)
        high, low = split_weights(whole, spec)
        gm.set_submodule(str(first.target), high)
        gm.set_submodule(str(node.target), low)
