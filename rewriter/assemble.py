"""From a plan to the quantized network that would ship: rewrite, fit, calibrate, refine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, fx

from rewriter.fit import FitReport, fit
from rewriter.int8.scheme import QuantScheme
from rewriter.int8.simulate import Quantized, quantize
from rewriter.plan import Plan, rewrite


@dataclass(frozen=True)
class Assembled:
    """A plan carried out: the quantized network, and how each fitted step came out."""

    quantized: Quantized
    fits: tuple[FitReport, ...]


def assemble(
    gm: fx.GraphModule,
    plan: Plan,
    scheme: QuantScheme,
    batches: Sequence[Tensor | tuple[Tensor, ...]],
    store: Path | None = None,
    seed: int = 0,
) -> Assembled:
    """Carry out ``plan`` on a profiled canonical graph (``rewriter.profile``), which is not touched.

    Args:
        gm: canonical graph of the float network.
        plan: what to do.
        scheme: the target.
        batches: unlabelled calibration inputs, each (N, C, H, W).
        store: folder with fitted weights, shared by all who fit the same thing.
        seed: of whatever is random in fitting.

    Raises:
        PlanError: the plan does not apply.
        QuantizeError: the calibration inputs are unusable.
    """
    fits = fit(gm, plan, batches, scheme, store, seed)
    rewritten = rewrite(gm, plan, fits.weights)
    method = rewritten.meta.get("calibration", "minmax")
    return Assembled(quantize(rewritten, scheme, batches, method), fits.reports)
