"""Ranges with the least predicted damage: rounding inside the range against what is cut off.

Each range is first cut to what its readers can tell (``rewriter.repair.useful_ranges``). Then, for each value and each
candidate range, the error d = Q(x) - x is made on the float values and weighed by the gradients g of the outputs:
damage ~ 1/2 E[(sum g d)^2]. Unlike a mean square error it knows which outliers carry the answer, and that what is
clipped adds up over positions where rounding errors cancel. As d depends on x alone, the gradients of a large value are first added up over
bins of x, much narrower than a step of int8; all candidates are then compared on the bins.
Source: after Nagel et al., 2021 (arXiv:2106.08295), section 3.1, with the Gauss-Newton loss in place of the squared error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from rewriter.damage.fisher import gradients
from rewriter.damage.grouping import fidelity_of
from rewriter.graph.lookup import is_call, layers
from rewriter.graph.ops import modules_by_call, types
from rewriter.int8.annotate import annotation, moves_values
from rewriter.int8.integer_grid import fake_quantize
from rewriter.int8.scheme import TINY, QuantSpec
from rewriter.int8.simulate import Quantized
from rewriter.repair.useful_ranges import cut_to_useful

# Inputs that are looked at (twice as many choose no better), and how many in one backward pass.
INPUTS = 24
ROWS = 8
# Numbers that are put into bins at a time: what is made of them stays in the processor's cache.
PIECE = 2**16
# Bins of a value's whole range; values with fewer numbers for each input than the second are rounded one by one.
BINS = 2**14
FEW = 2**10
# Candidates for the ends of a range, as shares of what was seen.
SHARES = (1.0, 0.93, 0.86, 0.78, 0.7, 0.6, 0.5, 0.4, 0.3)
# Ends of a network that turn logits into scores.
SQUASHES = types(lambda row: row.squashes)
SQUASHING = tuple(call for call, kind in modules_by_call().items() if kind in SQUASHES)
# A range must take away this share of the predicted damage of min-max, and this much more than chance could do.
LEAST_GAIN = 0.1


def least_damage_ranges(
    quantized: Quantized,
    batches: Sequence[Tensor | tuple[Tensor, ...]],
    seed: int = 0,
    given: Mapping[str, tuple[float, float]] | None = None,
) -> Quantized:
    """The same network with refined ranges.

    Args:
        quantized: annotated graph with min-max ranges.
        batches: calibration inputs, each (N, ...), or a tuple with one tensor for each input.
        seed: of the random projections.
        given: ranges that are known already, by owner.
    """
    generator = torch.Generator().manual_seed(seed)
    fidelity = fidelity_of(quantized.gm, batches)
    quantized = cut_to_useful(quantized, batches)
    ranges = quantized.calibration.values
    ranked = _ranked(quantized.gm)
    damages: dict[str, Tensor] = {}
    tables: dict[str, _Candidates] = {}
    looked_at = {
        n
        for n in quantized.gm.graph.nodes
        if annotation(n).output is not None
        and not (moves_values(quantized.gm, n) or n in ranked)
        and annotation(n).range_of not in (given or {})
    }
    for inputs in _parts(batches) if looked_at else ():
        values, slopes = gradients(quantized.gm, inputs, generator, fidelity, looked_at)
        for node, g in slopes.items():
            note = annotation(node)
            assert note.output is not None
            owner = note.range_of
            if owner not in tables:
                tables[owner] = _Candidates(*ranges[owner], note.output)
            rows = tables[owner].damages(values[node].detach(), g)
            damages[owner] = torch.cat([damages[owner], rows]) if owner in damages else rows
        del values, slopes
    refined = {**ranges, **(given or {})}
    for owner, table in damages.items():
        refined[owner] = tables[owner].ranges[_choice(table)]
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


class _Candidates:
    """The ranges that one value might have, and what each does to numbers all over the whole range."""

    def __init__(self, low: float, high: float, spec: QuantSpec) -> None:
        self.ranges = candidates(low, high)
        self.spec = spec
        self.params = [spec.params(*r) for r in self.ranges]
        # zero lies in the middle of a bin: it is exact in every range, and often the most frequent number
        self.width = max(high - low, TINY) / (BINS - 2)
        self.first = math.floor(low / self.width)
        self._errors: Tensor | None = None

    @property
    def errors(self) -> Tensor:
        """(candidates, bins) mean error of the numbers in each bin."""
        if self._errors is None:
            middles = (torch.arange(BINS, dtype=torch.float32) + self.first) * self.width
            # a bin in which the rounded number changes has both errors, which nearly cancel
            points = torch.stack([middles - self.width / 4, middles + self.width / 4])
            self._errors = torch.stack(
                [(fake_quantize(points, *p, self.spec) - points).mean(0) for p in self.params]
            )
        return self._errors

    def damages(self, x: Tensor, g: Tensor) -> Tensor:
        """(N, candidates) squares of sum(g d) over each input, d the error of each candidate."""
        x, g = _rows(x, g)
        sums = self._exact(x, g) if x.shape[1] < FEW else self._binned(x, g)
        return sums.double().square()

    def _binned(self, x: Tensor, g: Tensor) -> Tensor:
        rows = max(1, PIECE // x.shape[1])
        parts = zip(x.split(rows), g.split(rows), strict=True)
        return torch.cat([self._weights(a, b) for a, b in parts]) @ self.errors.T

    def _weights(self, x: Tensor, g: Tensor) -> Tensor:
        """(N, bins) sums of the gradients at the numbers that lie in each bin, float32."""
        size = len(x) * BINS
        sums = torch.zeros(size, dtype=torch.float64)
        starts = torch.arange(len(x), dtype=torch.int32).unsqueeze(1) * BINS
        for a, b in zip(x.split(PIECE, 1), g.split(PIECE, 1), strict=True):
            # rounded to the nearest, and none is negative: adding a half and cutting off is cheaper
            index = torch.mul(a, 1 / self.width).add_(0.5 - self.first).clamp_(0, BINS - 1)
            places = index.to(torch.int32)
            places = places.add_(starts) if len(x) > 1 else places
            sums += torch.bincount(places.view(-1), b.reshape(-1), size)
        return sums.view(len(x), BINS).float()

    def _exact(self, x: Tensor, g: Tensor) -> Tensor:
        sums = torch.zeros(len(x), len(self.ranges), dtype=torch.float64)
        for i, (scale, zero) in enumerate(self.params):
            d = fake_quantize(x, scale, zero, self.spec).sub_(x)
            sums[:, i] = torch.linalg.vecdot(d, g)
        return sums


def _rows(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (N, values), in one order, which is that of ``x`` in memory where its channels lie side by side."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x, g = (v.permute(0, 2, 3, 1) for v in (x, g))
    return x.contiguous().flatten(1), g.contiguous().flatten(1)


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
