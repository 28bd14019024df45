"""What a network about to be repaired takes over from one that is repaired and differs from it at a place or two.

Plans of a search are the same repairs with one place more. Where such a place is rewritten exactly, all other values of the float network
are the same, and so are the ranges of least damage. What errors a layer finds in its input, though, depends on
the roundings before it: its rounded weights are taken over where these errors are as large as they were, relative to the
input, and made anew where the place has taken away (or added) much of them. Its bias is always corrected anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.graph import facts
from rewriter.graph.lookup import layers, module_of
from rewriter.int8.annotate import annotation
from rewriter.int8.simulate import Quantized

# Errors of an input are as large as they were where their power, relative to its variance, is within this factor.
ALIKE = 1.1
# Inputs of each batch whose errors are looked at.
ROWS = 2
Range = tuple[float, float]


@dataclass(frozen=True)
class Alike:
    """A network before and after its repairs.

    Args:
        before: annotated graph with the float weights that were repaired.
        ranges: of its values, by owner, before they were refined.
        repaired: what the repairs made of it.
    """

    before: fx.GraphModule
    ranges: Mapping[str, Range]
    repaired: Quantized = field(repr=False)

    @cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.before.graph.nodes}

    @cached_property
    def _layers(self) -> dict[str, fx.Node]:
        return {n.name: n for n in layers(self.repaired.gm)}

    def ranges_for(self, quantized: Quantized) -> dict[str, Range]:
        """Refined ranges, by owner, of those values that are the same in a calibrated network."""
        found: dict[str, Range] = {}
        nodes = {n.name: n for n in quantized.gm.graph.nodes}
        for owner, span in quantized.calibration.values.items():
            chosen = self.repaired.calibration.values.get(owner)
            if chosen is None or owner not in self._nodes or self.ranges.get(owner) != span:
                continue
            if annotation(nodes[owner]).output == annotation(self._nodes[owner]).output:
                found[owner] = chosen
        return found

    def layer_for(self, quantized: Quantized, node: fx.Node) -> tuple[Tensor, Tensor] | None:
        """Rounded weight and scale of a layer that has the same float weights and reads the same value in the same range."""
        known, made = self._nodes.get(node.name), self._layers.get(node.name)
        if known is None or made is None or known.op != node.op or not facts.INT8.known(known):
            return None
        source, other = node.args[0], known.args[0]
        assert isinstance(source, fx.Node)
        assert isinstance(other, fx.Node)
        if annotation(known).weight != annotation(node).weight or source.name != other.name:
            return None
        if (source.name in annotation(node).reads) != (other.name in annotation(known).reads):
            return None
        if source.name in annotation(node).reads:
            if annotation(source).output != annotation(other).output:
                return None
            mine = quantized.calibration.values.get(annotation(source).range_of)
            if mine != self.repaired.calibration.values.get(annotation(other).range_of):
                return None
        layer, like = (module_of(g, n) for g, n in ((quantized.gm, node), (self.before, known)))
        if type(layer) is not type(like) or not _equal(layer, like):
            return None
        weight: Tensor = module_of(self.repaired.gm, made).weight.detach()
        return weight, self.repaired.calibration.weights[node.name]

    def as_noisy(self, node: fx.Node, noise: float) -> bool:
        """Whether a layer's input has errors as large as it had."""
        made = self._layers.get(node.name)
        known = None if made is None else facts.NOISE.get(made)
        return known is not None and known <= ALIKE * noise and noise <= ALIKE * known


def _equal(layer: Any, like: Any) -> bool:
    mine, its = layer.state_dict(), like.state_dict()
    return mine.keys() == its.keys() and all(
        a.shape == its[k].shape and torch.equal(a, its[k]) for k, a in mine.items()
    )


def input_noise(exact: list[Tensor], rounded: list[Tensor]) -> float:
    """Power of the errors of a layer's input, relative to the variance of the input; on a few inputs of each batch."""
    error, total, square, count = 0.0, 0.0, 0.0, 0
    for x, y in zip(exact, rounded, strict=True):
        a, b = x[:ROWS], y[:ROWS]
        error += float((a - b).square().sum(dtype=torch.float64))
        total += float(a.sum(dtype=torch.float64))
        square += float(a.square().sum(dtype=torch.float64))
        count += a.numel()
    return error / max(square - total**2 / count, 1e-30)
