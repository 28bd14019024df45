"""Ranges with the least predicted damage: rounding inside the range against what is cut off.

For each value and each candidate range, the error d = Q(x) - x is made on the float values and weighed by the gradients g of the answers:
damage ~ 1/2 E[(sum g d)^2]. Unlike a mean square error it knows which outliers carry the answer, and that what is
clipped adds up over positions where rounding errors cancel.
Source: after Nagel et al., 2021 (arXiv:2106.08295), section 3.1, with the Gauss-Newton loss in place of the squared error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from rewriter.graph import is_call, layers
from rewriter.influence import gradients
from rewriter.int8.annotate import annotation, moves_values
from rewriter.int8.scheme import QuantSpec, fake_quantize
from rewriter.int8.simulate import Quantized

# Inputs that are looked at, and how many in one backward pass.
INPUTS = 48
ROWS = 8
# Numbers that are rounded at a time.
PIECE = 2**16
# Candidates for the ends of a range, as shares of what was seen.
SHARES = (1.0, 0.93, 0.86, 0.78, 0.7, 0.6, 0.5, 0.4, 0.3)
# Ends of a network that turn logits into scores.
SQUASHES = (nn.Sigmoid, nn.Softmax, nn.LogSoftmax, nn.LogSigmoid, nn.Tanh)
SQUASHING = (
    torch.softmax,
    functional.softmax,
    torch.log_softmax,
    functional.log_softmax,
    "softmax",
    "log_softmax",
)
# A range must take away this share of the predicted damage of min-max, and this much more than chance could do.
LEAST_GAIN = 0.1
# After so many inputs only the whole range and the best others are looked at further.
TRIAL = 16
KEPT = 6


def least_damage_ranges(
    quantized: Quantized, batches: Sequence[Tensor | tuple[Tensor, ...]], seed: int = 0
) -> Quantized:
    """The same network with refined ranges.

    Args:
        quantized: annotated graph with min-max ranges.
        batches: calibration inputs, each (N, ...), or a tuple with one tensor for each input.
        seed: of the random projections.
    """
    generator = torch.Generator().manual_seed(seed)
    ranges = quantized.calibration.values
    ranked = _ranked(quantized.gm)
    damages: dict[str, Tensor] = {}
    tried: dict[str, list[tuple[float, float]]] = {}
    for inputs in _parts(batches):
        values, slopes = gradients(quantized.gm, inputs, generator)
        for node, g in slopes.items():
            note = annotation(node)
            if note.output is None or moves_values(quantized.gm, node) or node in ranked:
                continue
            owner = note.range_of
            some = tried.setdefault(owner, candidates(*ranges[owner]))
            rows = _damages(values[node].detach(), g, some, note.output)
            damages[owner] = torch.cat([damages[owner], rows]) if owner in damages else rows
        del values, slopes
        for owner, table in damages.items():
            if len(table) >= TRIAL and len(tried[owner]) > KEPT + 1:
                kept = _hopeful(table)
                damages[owner] = table[:, kept]
                tried[owner] = [tried[owner][i] for i in kept]
    refined = dict(ranges)
    for owner, table in damages.items():
        refined[owner] = tried[owner][_choice(table)]
    return replace(quantized, calibration=replace(quantized.calibration, values=refined))


def _ranked(gm: fx.GraphModule) -> set[fx.Node]:
    """Values from which an output is computed through a sigmoid or softmax, without a layer in between.

    There the gradient of a confident score is next to none, so that clipping looks free; but scores are ranked,
    and all that are clipped become equal.
    """
    weighted = set(layers(gm))
    ends: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        users = [u for u in node.users if u not in weighted]
        if any(u.op == "output" or u in ends for u in users):
            ends.add(node)
        if any(u in found or (u in ends and _squashes(gm, u)) for u in users):
            found.add(node)
    return found


def _squashes(gm: fx.GraphModule, node: fx.Node) -> bool:
    return is_call(gm, node, *SQUASHES) or node.target in SQUASHING


def _parts(batches: Sequence[Tensor | tuple[Tensor, ...]]) -> Sequence[tuple[Tensor, ...]]:
    """The first inputs, a few at a time."""
    parts: list[tuple[Tensor, ...]] = []
    left = INPUTS
    for batch in batches:
        whole = batch if isinstance(batch, tuple) else (batch,)
        pieces = zip(*(x[: max(left, 0)].split(ROWS) for x in whole), strict=True)
        parts.extend(piece for piece in pieces if len(piece[0]))
        left -= len(whole[0])
    return parts


def candidates(low: float, high: float) -> list[tuple[float, float]]:
    """Ranges inside (low, high), the whole one first; one end or both drawn in."""
    found = [(low * s, high * s) for s in SHARES]
    if low < 0 < high:
        found += [(low, high * s) for s in SHARES[1:]] + [(low * s, high) for s in SHARES[1:]]
    return found


def _damages(x: Tensor, g: Tensor, ranges: list[tuple[float, float]], spec: QuantSpec) -> Tensor:
    """(N, candidates) squares of sum(g d), d the error of each candidate.

    Piece by piece, each of which stays in the processor's cache while all candidates are tried on it: a third of the time.
    """
    x, g = _rows(x, g)
    params = [spec.params(low, high) for low, high in ranges]
    sums = torch.zeros(len(ranges), len(x), dtype=torch.float64, device=x.device)
    height = max(1, PIECE // max(1, x.shape[1]))
    for first in range(0, len(x), height):
        rows = slice(first, first + height)
        for start in range(0, x.shape[1], PIECE):
            columns = slice(start, start + PIECE)
            part, weight = x[rows, columns], g[rows, columns]
            d = torch.empty_like(part)
            for total, (scale, zero) in zip(sums, params, strict=True):
                fake_quantize(part, scale, zero, spec, d).sub_(part)
                total[rows] += torch.linalg.vecdot(d, weight)
    return sums.square().T


def _rows(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (N, values), in one order, which is that of ``x`` in memory where its channels lie side by side."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x, g = (v.permute(0, 2, 3, 1) for v in (x, g))
    return x.contiguous().flatten(1), g.contiguous().flatten(1)


def _hopeful(table: Tensor) -> list[int]:
    """The columns to go on with: the first, of the whole range, and those with the least means."""
    best = (table.mean(0)[1:].argsort(stable=True)[:KEPT] + 1).tolist()
    return [0, *sorted(best)]


def _choice(table: Tensor) -> int:
    """The candidate with the least mean; the whole range where the gain is small or could be chance."""
    mean = table.mean(0)
    best = int(mean.argmin())
    difference = table[:, 0] - table[:, best]
    chance = (
        float(difference.std()) / max(1, len(difference)) ** 0.5 if len(difference) > 1 else 0.0
    )
    gain = float(difference.mean())
    return best if gain > max(chance, LEAST_GAIN * float(mean[0])) else 0
