"""Scale the channels of every value so that int8 rounding does the least damage.

Before: x -> W1 -> ReLU -> W2 -> y
After:  x -> S W1 -> ReLU -> W2 S^-1 -> y     S = diag(s), s (C,) > 0

    f(s x) = s f(x)   for ReLU, LeakyReLU, PReLU, sums, pooling, ...

Depthwise layers have a scale on both sides, a residual stream has one for all that is added to it
(``rewriter.surgery.channel_scales``). All scales are chosen together, for the target's way of
storing weights, by minimizing the predicted damage (``rewriter.surgery.equalization``). A ReLU6
stays a ReLU6: a channel that reaches the cap on the calibration inputs keeps its scale, so that
the cap remains one number, which the saturation of int8 carries out; the others are scaled up to
90 % of the cap at most.

Why: one scale holds a tensor whose channels differ widely in range badly; after scaling they are
    alike.
Exact: yes, but for a ReLU6, where it is exact on the calibration inputs: on an input that reaches
    further than all of them a scaled channel may meet the cap.
Cost: none.
Source: cross-layer equalization, after Nagel et al., 2019 (arXiv:1906.04721), section 4.1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from rewriter.graph import facts
from rewriter.rules._model_rule import WholeModelRule
from rewriter.rules._rule import Contract, Site
from rewriter.surgery.channel_scales import known_scales, rescale, scale_variables
from rewriter.surgery.equalization import (
    Damage,
    dead_bounds,
    least_damage,
    log_bounds,
)

# What is left below the cap of a ReLU6 by the largest value seen.
MARGIN = 0.1


class Equalize(WholeModelRule):
    """Cross-layer equalization of all free channels; exact."""

    name: ClassVar[str] = "equalize"
    version: ClassVar[int] = 3
    contract: ClassVar[Contract] = "exact"
    weighs: ClassVar[bool] = True

    def problem(self, gm: fx.GraphModule) -> str:
        if not any(facts.CHANNEL_RANGE.known(n) for n in gm.graph.nodes):
            return "no calibrated channel ranges"
        channels = scale_variables(gm)
        if bool(log_bounds(gm, channels, MARGIN)[1].any()):
            return ""
        reasons = [f"{value}: {why}" for value, why in channels.reasons.items()]
        return "no channel can be scaled: " + ("; ".join(reasons[:3]) or "all reach a cap")

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        channels = scale_variables(gm)
        scheme = facts.SCHEME.get(gm)
        specs = (scheme.weights, scheme.linear_weights) if scheme is not None else (None, None)
        upper, free = log_bounds(gm, channels, MARGIN)
        lower, most = dead_bounds(gm, channels)
        upper = torch.minimum(upper, most)
        start, settled = known_scales(gm, channels, facts.KNOWN_SCALES.get(gm, {}))
        facts.KNOWN_SCALES.drop(gm)
        start = torch.where(free, start.clamp(lower, upper), 0.0)
        free &= ~settled
        damage = Damage(gm, channels, *specs, moving=free if bool(settled.any()) else None)
        logs = least_damage(damage, upper, free, lower=lower, start=start)[0]
        rescale(gm, channels, logs.exp())
        facts.LOG_SCALES.put(gm, {name: logs[v] for name, v in channels.of.items()})
