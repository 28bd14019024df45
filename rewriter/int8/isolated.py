"""A runtime and the simulation, operation by operation, each on the runtime's own inputs.

Where two engines are compared on whole networks, single steps in early layers grow into differences everywhere, and
nothing says which operation is guilty. Here every operation of the simulation reads what the runtime computed, so that a
difference is that of the one operation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rewriter.graph.interpret import run_node
from rewriter.graph.lookup import kind_of, layer_name
from rewriter.int8.annotate import annotation
from rewriter.int8.integer_grid import fake_quantize
from rewriter.int8.simulate import Quantized, simulate


@dataclass(frozen=True)
class Agreement:
    """One int8 value of a runtime against what the simulation makes of the same inputs.

    Args:
        node: name of the node that makes it.
        layer: the module's own name, where it is one.
        kind: what the operation is, in a word.
        sqnr_db: energy of the value over that of the difference; infinite where equal.
        differs: share of the elements that lie more than half a step apart.
        largest: largest difference in steps.
    """

    node: str
    layer: str
    kind: str
    sqnr_db: float
    differs: float
    largest: float


def int8_values(quantized: Quantized) -> list[str]:
    """Names of the nodes whose values exist in int8, but for inputs and what an operation only returns."""
    return [
        n.name
        for n in quantized.gm.graph.nodes
        if n.op not in ("output", "placeholder") and annotation(n).output is not None
    ]


@torch.no_grad()
def isolated(
    quantized: Quantized,
    inputs: Tensor,
    found: Mapping[str, Tensor],
    fixed_point: bool | None = None,
) -> list[Agreement]:
    """Compare a runtime's values, in the order in which they are made.

    Args:
        quantized: annotated graph and its ranges.
        inputs: (n, ...) what the runtime was given.
        found: dequantized values of the runtime by node name, in torch's layout.
        fixed_point: whether the runtime requantizes by integer multipliers; None: as the target's reference kernels.
    """
    gm = simulate(quantized, kernels=True, fixed_point=fixed_point)
    feed, values = iter([inputs]), dict[fx.Node, object]()
    originals = {n.name: n for n in quantized.gm.graph.nodes}
    rows: list[Agreement] = []
    for node in gm.graph.nodes:
        if node.op == "output":
            break
        values[node] = run_node(gm, node, values, feed)
        if node.name not in found or node.name not in originals:
            continue
        origin = originals[node.name]
        spec, value = annotation(origin).output, values[node]
        assert spec is not None and isinstance(value, Tensor)
        scale, zero = quantized.value_params(origin)
        expected = fake_quantize(value.float(), scale, zero, spec)
        steps = (expected - found[node.name]).abs() / scale
        rows.append(
            Agreement(
                node.name,
                layer_name(origin) if origin.op == "call_module" else node.name,
                _kind(quantized.gm, origin),
                _ratio(expected, found[node.name]),
                float((steps > 0.5).float().mean()),
                float(steps.max()),
            )
        )
        values[node] = found[node.name]
    return rows


def _ratio(expected: Tensor, found: Tensor) -> float:
    noise = float((expected.double() - found.double()).square().sum())
    energy = float(expected.double().square().sum())
    return 10 * math.log10(energy / noise) if noise > 0 and energy > 0 else math.inf


def _kind(gm: fx.GraphModule, node: fx.Node) -> str:
    """The operation that writes a value: the layer or sum before a clip that its kernel computes."""
    if node.op == "call_module" and not annotation(node).reads:
        (source,) = node.all_input_nodes or (node,)
        return kind_of(gm, source)
    return kind_of(gm, node)


def guilty(rows: Sequence[Agreement], share: float) -> Agreement | None:
    """The operation that disagrees most, if more than a share of its elements does."""
    worst = max(rows, key=lambda r: r.differs, default=None)
    return worst if worst is not None and worst.differs > share else None


def kinds(rows: Sequence[Agreement]) -> dict[str, tuple[int, float, float]]:
    """For each kind of operation: how many, the largest share that differs, the largest difference in steps."""
    table: dict[str, tuple[int, float, float]] = {}
    for row in rows:
        count, differs, largest = table.get(row.kind, (0, 0.0, 0.0))
        table[row.kind] = (count + 1, max(differs, row.differs), max(largest, row.largest))
    return table
