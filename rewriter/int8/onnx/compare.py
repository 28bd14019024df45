"""Simulation and ONNX Runtime side by side, value by value: where they first depart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.graph.interpret import walk
from rewriter.graph.lookup import layer_name
from rewriter.int8.annotate import annotation
from rewriter.int8.integer_grid import fake_quantize
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.session import Session
from rewriter.int8.simulate import Quantized, simulate

# A value departs where more than this share of its elements lies more than half a step apart.
DEPARTING_SHARE = 1e-3
# ONNX Runtime's CPU kernels compute in float32 what reads or writes 16 bits. The last bits move such small steps by one,
# then values of 8 bits behind them where they are next to a tie, and each of these is many steps of 16 bits further on.
APART = {8: 0.5, 16: 1.5}  # steps
DEPARTING_SHARE_INT16 = {8: 0.02, 16: 0.2}  # by the bits of the value


@dataclass(frozen=True)
class Comparison:
    """One int8 value in both engines.

    Args:
        node: name of the node that makes it; ``layer`` is the module's own name.
        sqnr_db: energy of the simulated value over that of the difference; infinite where equal.
        differs: share of the elements that lie more than half a step apart.
        largest: largest difference in steps.
    """

    node: str
    layer: str
    sqnr_db: float
    differs: float
    largest: float


def compare(
    quantized: Quantized, inputs: Tensor, optimize: bool = True, threads: int = 2
) -> list[Comparison]:
    """Every int8 value of the graph, in the order in which they are made.

    Args:
        quantized: annotated graph and its ranges.
        inputs: (n, C, H, W) a few inputs; all values of them are held in memory.
        optimize: compare with ONNX Runtime's int8 kernels; False: with the file as it is written.
        threads: of ONNX Runtime.
    """
    nodes = [n for n in quantized.gm.graph.nodes if _stored(n)]
    names = [n.name for n in nodes]
    session = Session(to_onnx(quantized, names), threads=threads, optimize=optimize)
    found = session.run(inputs)[-len(names) :]
    with torch.no_grad():
        simulated = {
            n.name: v
            for n, v in walk(simulate(quantized, kernels=True), (inputs,))
            if n.name in names
        }
    rows: list[Comparison] = []
    for node, value in zip(nodes, found, strict=True):
        scale, zero = quantized.value_params(node)
        spec: Any = annotation(node).output
        expected = fake_quantize(simulated[node.name].float(), scale, zero, spec)
        steps = (expected - torch.from_numpy(value)).abs() / scale
        noise = float((steps.double() * scale).square().sum())
        energy = float(expected.double().square().sum())
        ratio = 10 * math.log10(energy / noise) if noise > 0 and energy > 0 else math.inf
        rows.append(
            Comparison(
                node.name,
                layer_name(node) if node.op == "call_module" else node.name,
                ratio,
                float((steps > APART[spec.bits]).float().mean()),
                float(steps.max()),
            )
        )
    return rows


def first_departure(rows: list[Comparison], quantized: Quantized) -> Comparison | None:
    """The first value on which the engines disagree by more than ties in rounding; None if there is none.

    Args:
        rows: of ``compare``.
        quantized: what was compared: with 16-bit values more is a tie.
    """
    outputs = {n.name: annotation(n).output for n in quantized.gm.graph.nodes}
    bits = {name: spec.bits for name, spec in outputs.items() if spec is not None}
    most = DEPARTING_SHARE_INT16 if 16 in bits.values() else {8: DEPARTING_SHARE}
    return next((r for r in rows if r.differs > most[bits[r.node]]), None)


def _stored(node: Any) -> bool:
    return node.op != "output" and annotation(node).output is not None
