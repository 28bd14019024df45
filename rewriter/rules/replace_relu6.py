"""ReLU6 -> ReLU wherever its cap is never reached.

Before: y = min(max(x, 0), 6)
After:  y = max(x, 0)

The largest value on the calibration inputs must leave at least 10 % below the cap.

Why: without a cap the channels can be scaled freely (``equalize``), and no runtime has to carry
    the clip out.
Exact: on the calibration inputs; an input that reaches the cap would differ.
Cost: none.
Source: Nagel et al., 2019 (arXiv:1906.04721), section 5.1.1, where every ReLU6 is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

from torch import fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import module_of
from rewriter.graph.ops import clip_bounds
from rewriter.rules._model_rule import WholeModelRule
from rewriter.rules._rule import Contract, Site, mark

# What is left below the cap by the largest value seen.
MARGIN = 0.1


class ReplaceRelu6(WholeModelRule):
    """All ReLU6 (and Hardtanh from zero) of the model whose cap does nothing."""

    name: ClassVar[str] = "replace_relu6"
    contract: ClassVar[Contract] = "exact"
    replaces: ClassVar[bool] = True

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        if any(True for _ in _capped(gm)):
            yield from super().match(gm)

    def problem(self, gm: fx.GraphModule) -> str:
        reached = [_reached(gm, n) for n in _capped(gm)]
        return "" if "" in reached else "; ".join(reached[:3])

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        for node in _capped(gm):
            if not _reached(gm, node):
                gm.set_submodule(str(node.target), nn.ReLU().eval())
                mark(node, site)


def _capped(gm: fx.GraphModule) -> Iterator[fx.Node]:
    for node in gm.graph.nodes:
        bounds = clip_bounds(module_of(gm, node)) if node.op == "call_module" else None
        if bounds is not None and bounds[0] == 0 and bounds[1] < math.inf:
            yield node


def _reached(gm: fx.GraphModule, node: fx.Node) -> str:
    """Why the cap is needed; "" if it is not."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    cap = module_of(gm, node).max_val
    if not facts.CHANNEL_RANGE.known(source):
        return f"{node.name}: no calibrated channel ranges"
    high = float(facts.CHANNEL_RANGE.of(source)[1].max())
    return f"{node.name}: reaches {high:.3g}, cap {cap:.3g}" if high * (1 + MARGIN) >= cap else ""
