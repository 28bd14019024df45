"""Images at their size -> the same images, smaller, inside the network.

Before: x (N, C, H, W) -> network
After:  x -> bilinear resize (N, C, h, w) -> network

    h = percent / 100 H, w = percent / 100 W, in multiples of 8

The network's input keeps its size, so that data and deployment need no change; the resize is the
first operation of the exported file and runs in float, before the input is quantized. Only where
the outputs keep their shapes: boxes of a detection grid would come out in other units.

Why: it is the saving that every other has to beat, and goes well with thinning.
Exact: no; nothing is fitted.
Cost: fewer MACs, by the square of the side, of all layers at once.
Source: Howard et al., 2017 (arXiv:1704.04861), the resolution multiplier.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx, nn

from rewriter.graph import facts
from rewriter.graph.edit import add_module, copy_graph
from rewriter.graph.interpret import propagate_shapes
from rewriter.graph.lookup import find, outputs
from rewriter.rules._rule import Contract, RewriteRule, Site

# Percent of the side.
SIDES = (93, 86, 80)
MULTIPLE, MIN_SIDE = 8, 64


@dataclass(frozen=True)
class LowerResolution(RewriteRule):
    """One site, the input, where there is only one and it holds images."""

    percent: int = 86
    contract: ClassVar[Contract] = "approximate"
    stage: ClassVar[Literal["replace", "split", "thin", "resize"]] = "resize"
    saves: ClassVar[bool] = True
    scales: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"lower_resolution_{self.percent}"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        inputs = gm.graph.find_nodes(op="placeholder")
        if len(inputs) != 1 or len(facts.SHAPE.get(inputs[0], ())) != 4:
            return
        (node,) = inputs
        size = self._size(node)
        if size == tuple(facts.SHAPE.of(node)[2:]) or min(size) < MIN_SIDE:
            return
        blocked = _problem(gm, node, size)
        if not blocked or self.percent == SIDES[0]:  # a near miss is shown once
            yield self.site(node, blocked=blocked)

    def near(self, gm: fx.GraphModule, names: Set[str]) -> Iterator[Site]:
        """Nothing: a smaller image is no answer to what int8 does."""
        return iter(())

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        node = find(gm, site.anchor)
        _resize(gm, node, self._size(node))
        gm.recompile()
        propagate_shapes(gm)

    def _size(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(
            max(1, round(n * self.percent / 100 / MULTIPLE)) * MULTIPLE
            for n in facts.SHAPE.of(node)[2:]
        )


def _resize(gm: fx.GraphModule, node: fx.Node, size: tuple[int, ...]) -> None:
    """Edit gm: everything that reads a value reads it resized."""
    resize = nn.Upsample(size=size, mode="bilinear", align_corners=False)
    with gm.graph.inserting_after(node):
        made = gm.graph.call_module(add_module(gm, "resize", resize), (node,))
    node.replace_all_uses_with(made, lambda user: user is not made)
    facts.keep(made, node, facts.SHAPE, facts.DTYPE, facts.CHANNEL_RANGE)
    facts.KEEP_FLOAT.put(made, True)


def _problem(gm: fx.GraphModule, node: fx.Node, size: tuple[int, ...]) -> str:
    """Why a network cannot be run on smaller images, "" if it can."""
    before = [facts.SHAPE.of(n) for n in outputs(gm)]
    tried = copy_graph(gm)
    _resize(tried, find(tried, node.name), size)
    tried.recompile()
    try:
        propagate_shapes(tried)
    except (RuntimeError, ValueError, TypeError, IndexError) as cause:
        return f"cannot be run at {size[0]} x {size[1]}: {str(cause).splitlines()[0]}"
    for old, new in zip(before, (facts.SHAPE.of(n) for n in outputs(tried)), strict=True):
        if old != new:
            return f"its output would have the shape {new}, not {old}"
    return ""
