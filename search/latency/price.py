"""What a file costs beside its MACs: milliseconds by the table, bytes moved, operators, what runs in float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from torch import Tensor, fx

from rewriter import Plan, quantize
from rewriter.int8 import QuantScheme
from rewriter.int8.onnx import Profile, profiled, to_onnx
from rewriter.plan import rewrite
from search.latency.table import Table

# Runs behind the time of a kernel: as many as take about so long, within bounds.
BUDGET_MS, FEWEST, MOST = 400.0, 6, 20
MACS_PER_MS = 2e7  # of a processor core, roughly: only for how often a file is run


@dataclass(frozen=True)
class Price:
    """What one file costs for one input.

    Attributes:
        milliseconds: By the table, on one thread.
        int8_macs: Multiply-accumulates of kernels that read integers.
        float_macs: Of those that read floats.
        bytes_moved: Read and written by all kernels.
        operators: How many kernels run.
        reorders: How many of each kind only change the layout of values.
        size: Bytes of the file.
    """

    milliseconds: float
    int8_macs: int
    float_macs: int
    bytes_moved: int
    operators: int
    reorders: Mapping[str, int]
    size: int


def price_of(model: onnx.ModelProto | bytes, x: Tensor, table: Table) -> Price:
    """What a file costs; kernels that the table lacks are measured, where it measures.

    Args:
        model: The file.
        x: One input, (1, ...).
        table: Times of kernels.
    """
    source = model if isinstance(model, bytes) else model.SerializeToString()
    seen = profiled(source, x)
    if table.measures and table.missing(seen.kernels):
        table.add(profiled(source, x, runs=_runs(seen)))
    return Price(
        milliseconds=round(table.predict(seen.kernels), 4),
        int8_macs=seen.int8_macs,
        float_macs=seen.float_macs,
        bytes_moved=seen.bytes_moved,
        operators=len(seen.kernels),
        reorders=seen.reorders,
        size=len(source),
    )


def price_of_plan(
    gm: fx.GraphModule, plan: Plan, scheme: QuantScheme, x: Tensor, table: Table
) -> Price:
    """What the file of a plan will cost, before it is fitted, calibrated and repaired: none of these adds a kernel.

    Args:
        gm: Profiled canonical graph.
        plan: The plan.
        scheme: A target that ONNX Runtime runs.
        x: A few inputs, whose ranges stand for those of the calibration.
        table: Times of kernels.

    Raises:
        RewriteError: the plan cannot be carried out.
    """
    made = rewrite(gm, plan, facts={"scheme": scheme})
    return price_of(to_onnx(quantize(made, scheme, [x])), x[:1], table)


def _runs(seen: Profile) -> int:
    expected = (seen.int8_macs + seen.float_macs) / MACS_PER_MS
    return int(min(max(BUDGET_MS / max(expected, 1e-3), FEWEST), MOST))
