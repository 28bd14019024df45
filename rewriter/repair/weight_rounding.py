"""Rounding of weights that minimises the error of a layer's output, not of the weights.

With X the inputs as the int8 kernel sees them, H = X X^T, and W* the weights that would reproduce the float layer on X, the rounded
weights Q minimise tr((Q - W*) H (Q - W*)^T): column by column, the error of each column being made good by those not
yet rounded, then by coordinate descent until nothing changes. Closed form: no gradient, seconds for a network.
Source: Frantar et al., 2022 (arXiv:2210.17323); Behdin et al., 2023 (arXiv:2309.01885) for the descent;
Nagel et al., 2020 (arXiv:2004.10568) for why nearest is not best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Share of the mean diagonal that is added to H, and more where few positions stand against many weights: keeps directions that the
# inputs hardly took near the float weights. On inputs that H was not made of, less of it loses up to 40 % there and gains 1 % elsewhere.
DAMPING = 0.1
# Numbers that are unfolded for one layer, all inputs together, and the fewest positions taken of one input.
UNFOLDED = 2**21
LEAST_POSITIONS = 8
# Columns that are rounded before their errors are passed on to all others in one product.
BLOCK = 64
# Candidates for the ridge, as shares of the mean diagonal of H.
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Candidates for the scale, as shares of the one that holds every weight.
SHARES = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6)

Array = np.ndarray[Any, Any]


@dataclass
class Moments:
    """Second moments of a layer's inputs, centred: the bias takes up every mean.

    Args:
        hessian: (G, K, K) of the int8 inputs with themselves, G groups, K = C_in / groups * k * k.
        cross: (G, K, K) of the float inputs (rows) with the int8 inputs (columns).
        places: number of positions behind them.
    """

    hessian: Tensor
    cross: Tensor
    places: int


class MomentSums:
    """Accumulates ``Moments`` in two halves: products in float32 about the first batch's mean, sums in float64."""

    def __init__(self) -> None:
        self.centre: tuple[Tensor, Tensor] | None = None
        self.sums: list[list[Tensor]] = [[], []]
        self.places = [0, 0]

    def add(self, exact: Tensor, rounded: Tensor, half: int = 0) -> None:
        """Add columns (G, K, positions) of the float input and of the int8 input to one half."""
        if self.centre is None:
            self.centre = exact.mean(2, keepdim=True), rounded.mean(2, keepdim=True)
        x, y = exact - self.centre[0], rounded - self.centre[1]
        new = [y @ y.transpose(1, 2), x @ y.transpose(1, 2), x.sum(2), y.sum(2)]
        old = self.sums[half]
        self.sums[half] = (
            [a.add_(b) for a, b in zip(old, new, strict=True)]
            if old
            else [v.double() for v in new]
        )
        self.places[half] += x.shape[2]

    def moments(self) -> Moments:
        """Of all inputs."""
        filled = [s for s in self.sums if s]
        sums = [torch.stack(parts).sum(0) for parts in zip(*filled, strict=True)]
        return _central(sums, sum(self.places))

    def halves(self) -> list[Moments]:
        """Of each half; none where one of them is empty."""
        if not all(self.places):
            return []
        return [_central(s, n) for s, n in zip(self.sums, self.places, strict=True)]


def _central(sums: list[Tensor], places: int) -> Moments:
    yy, xy, x, y = (s / places for s in sums)
    outer = y[:, :, None] * y[:, None, :]
    return Moments(yy - outer, xy - x[:, :, None] * y[:, None, :], places)


def reproducing(weight: Tensor, sums: MomentSums) -> Tensor:
    """The weights that give the float layer's output from the int8 inputs: ridge regression towards ``weight``.

    What errors upstream do to these inputs is partly chance, and fitting it takes from other inputs what it gives to these (in a deep
    network much more than it gives). So the ridge is the one with the least error on inputs that were not fitted,
    each half of them judging the other's; ``weight`` itself where none is better on both.

    Args:
        weight: (G, O, K).
        sums: moments of its inputs.
    """
    weight, halves = weight.double(), sums.halves()
    if not halves or min(h.places for h in halves) < weight.shape[2]:
        return weight  # fewer equations than unknowns
    problems = [_Ridge(weight, fitted) for fitted in halves]
    least, best = None, RIDGES[-1]
    for share in reversed(RIDGES):
        errors = [
            other.added(fitted.change(share)) for fitted, other in (problems, problems[::-1])
        ]
        # the error first falls with the ridge, then rises: behind its minimum nothing is looked for
        if least is not None and sum(errors) >= sum(least):
            break
        least, best = errors, share
    if least is None or max(least) >= 0:
        return weight
    return weight + _Ridge(weight, sums.moments()).change(best).double()


class _Ridge:
    """Ridge regression on some moments; in float32, which the ridge makes precise enough, at half the time of float64."""

    def __init__(self, weight: Tensor, moments: Moments) -> None:
        self.hessian = moments.hessian.float()
        self.wanted = (weight @ (moments.cross - moments.hessian)).float()

    def change(self, share: float) -> Tensor:
        """(G, O, K) what is added to the weights, with a share of the mean diagonal as the ridge."""
        factor = torch.linalg.cholesky(_ridge(self.hessian, share))
        return torch.cholesky_solve(self.wanted.transpose(1, 2), factor).transpose(1, 2)

    def added(self, change: Tensor) -> float:
        """What a change of the weights adds to the mean squared error of the output."""
        terms = (change @ self.hessian - 2 * self.wanted) * change
        return float(terms.sum(2).double().sum())


def _ridge(hessian: Tensor, share: float) -> Tensor:
    """H with a share of its mean diagonal added."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    amount = diagonal.mean(1, keepdim=True).clamp_min(1e-12) * share
    ridged = hessian.clone()
    ridged.diagonal(dim1=1, dim2=2).add_(amount)
    return ridged


def round_weights(
    weight: Tensor,
    scale: Tensor,
    hessian: Tensor,
    qmin: int,
    qmax: int,
    damping: float = DAMPING,
    sweeps: int = 3,
) -> Tensor:
    """Integers Q with the least tr((Q scale - W) H (Q scale - W)^T) found.

    Args:
        weight: (G, O, K) target.
        scale: (G, O, 1) step of each output's weights.
        hessian: (G, K, K) positive semi-definite.
        qmin: smallest integer.
        qmax: largest integer.
        damping: share of the mean diagonal that is added to H.
        sweeps: of coordinate descent at the end.

    Returns:
        (G, O, K) float64 with integer values.
    """
    damped = _ridge(hessian, damping).float()
    # the columns with the most power first: their error can still be made good by many others
    order = damped.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    h = _permuted(damped, order)
    w = (weight.double() / scale).gather(2, order[:, None].expand_as(weight)).float()
    q = _one_pass(w, h, qmin, qmax)
    q = _descend(q, w, h, qmin, qmax, sweeps)
    nearest = w.round().clamp(qmin, qmax)
    worse = _loss(q, w, h) > _loss(nearest, w, h)
    q = torch.where(worse[..., None], nearest, q)
    back = order.argsort(1)
    return q.gather(2, back[:, None].expand_as(q)).double()


def _permuted(h: Tensor, order: Tensor) -> Tensor:
    rows = h.gather(1, order[:, :, None].expand_as(h))
    return rows.gather(2, order[:, None, :].expand_as(h))


def _loss(q: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """(G, O) error of each output, in units of its step squared."""
    d = q - w
    return ((d @ h) * d).sum(2)


def _columns(x: Tensor) -> Array:
    """(G, O, K) as (K, G, O), so that a column lies in one piece; a copy."""
    return x.movedim(2, 0).contiguous().clone().numpy()


def _one_pass(w: Tensor, h: Tensor, qmin: int, qmax: int) -> Tensor:
    """Round column by column; what is left of a column's error goes to the columns after it.

    The loop over columns is in numpy, whose calls on small arrays cost a fifth of torch's; products of blocks are torch's.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)  # (G, K, K)
    rows = upper.permute(1, 2, 0).unsqueeze(3).contiguous().numpy()  # (K, K, G, 1)
    left, count = _columns(w), w.shape[2]
    q = np.empty_like(left)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        errors = np.empty_like(left[start:stop])
        for j in range(start, stop):
            column = left[j]
            np.rint(column, out=q[j])
            np.maximum(q[j], qmin, out=q[j])
            np.minimum(q[j], qmax, out=q[j])
            error = np.subtract(column, q[j], out=errors[j - start])
            error /= rows[j, j]
            if j + 1 < stop:
                left[j + 1 : stop] -= rows[j, j + 1 : stop] * error
        if stop < count:
            moved = upper[:, start:stop, stop:].transpose(1, 2) @ _groups(errors)
            left[stop:] -= moved.transpose(0, 1).numpy()
    return torch.from_numpy(q).movedim(0, 2).contiguous()


def _groups(columns: Array) -> Tensor:
    """(B, G, O) as (G, B, O)."""
    return torch.from_numpy(columns).transpose(0, 1)


def _descend(q: Tensor, w: Tensor, h: Tensor, qmin: int, qmax: int, sweeps: int) -> Tensor:
    """Coordinate descent: each column to its best integer given all others, until a sweep changes nothing."""
    slope = torch.from_numpy(_columns((w - q) @ h))  # (K, G, O), minus half the gradient
    steps_of = h.diagonal(dim1=1, dim2=2).T.unsqueeze(2).reciprocal().contiguous().numpy()
    rows = h.permute(1, 2, 0).unsqueeze(3).contiguous().numpy()  # (K, K, G, 1)
    found = _columns(q)
    for _ in range(sweeps):
        changed = False
        for start in range(0, len(found), BLOCK):
            stop = min(start + BLOCK, len(found))
            inner = slope[start:stop].numpy().copy()
            steps = np.zeros_like(inner)
            for j in range(start, stop):
                step = steps[j - start]
                np.multiply(inner[j - start], steps_of[j], out=step)
                step += found[j]
                np.rint(step, out=step)
                np.maximum(step, qmin, out=step)
                np.minimum(step, qmax, out=step)
                step -= found[j]
                if step.any():
                    found[j] += step
                    changed = True
                    if j + 1 < stop:
                        inner[j + 1 - start :] -= rows[j, j + 1 : stop] * step
            # what the block did to all columns, in one product
            if steps.any():
                slope -= (h[:, :, start:stop] @ _groups(steps)).transpose(0, 1)
        if not changed:
            break
    return torch.from_numpy(found).movedim(0, 2).contiguous()


def best_scale(
    weight: Tensor, largest: Tensor, hessian: Tensor, qmin: int, qmax: int, shared: bool
) -> Tensor:
    """The step among shares of ``largest`` whose nearest rounding has the least output error.

    Args:
        weight: (G, O, K).
        largest: (G, O, 1) step that holds every weight.
        hessian: (G, K, K).
        qmin: smallest integer.
        qmax: largest integer.
        shared: whether all outputs have one step.
    """
    w, h = weight.float(), hessian.float()
    best, least = largest.double(), torch.full(largest.shape[:2], float("inf")).double()
    for share in SHARES:
        scale = largest.double() * share
        step = scale.float()
        q = (w / step).round_().clamp_(qmin, qmax).mul_(step)
        error = _loss(q, w, h).double()
        if shared:
            error = error.sum().expand_as(error)
        better = error < least
        best = torch.where(better[..., None], scale, best)
        least = torch.where(better, error, least)
    return best


def patches(
    layer: nn.Module, inputs: tuple[Tensor, ...], samples: int, seed: int = 0
) -> list[Tensor]:
    """What the weights of a convolution or linear layer are multiplied with, at random positions.

    Args:
        layer: Conv1d, Conv2d or Linear.
        inputs: tensors (N, C, ...) of one shape; the same positions are taken of each.
        samples: number of inputs in all batches together; decides how many positions of each are needed.
        seed: of the positions.

    Returns:
        For each tensor (G, K, positions), K = C_in / groups * k * k in the order of the layer's weight.
    """
    if isinstance(layer, nn.Linear):
        return [x.flatten(0, -2).T.unsqueeze(0) for x in inputs]
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    taps = layer.in_channels * math.prod(layer.kernel_size)
    wanted = max(LEAST_POSITIONS, UNFOLDED // (taps * samples))
    zeros = layer.padding_mode == "zeros"
    index = _positions(layer, inputs[0], wanted, seed)  # (S, taps) into the padded image
    index, inside = _without_padding(layer, inputs[0], index) if zeros else (index, None)
    found: list[Tensor] = []
    for x in inputs:
        x = x if zeros else F.pad(x, _pads(layer), mode=layer.padding_mode)
        # channels last: rows of a pixel, so that nothing but what is taken is copied
        taken = x.movedim(1, -1).flatten(1, -2)[:, index.flatten()]  # (N, S * taps, C)
        if inside is not None:
            taken = taken * inside.view(-1, 1)
        taken = taken.unflatten(1, tuple(index.shape)).unflatten(-1, (layer.groups, -1))
        found.append(_as_columns(taken))
    return found


def _as_columns(taken: Tensor) -> Tensor:
    """(N, S, taps, G, C) as (G, C * taps, N * S); a view where there is one group and one tap."""
    n, s, taps, groups, channels = taken.shape
    if groups == 1 and taps == 1:
        return taken.view(n * s, channels).T.unsqueeze(0)
    return taken.permute(3, 4, 2, 0, 1).reshape(groups, channels * taps, n * s)


def _without_padding(
    layer: nn.Conv1d | nn.Conv2d, x: Tensor, index: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Indices into the image itself, and a factor: 0 where an index lay in the padding, None where none did."""
    pads = _pads(layer)
    if not any(pads):
        return index, None
    sizes = list(x.shape[2:])
    before = [pads[2 * (len(sizes) - 1 - i)] for i in range(len(sizes))]
    after = [pads[2 * (len(sizes) - 1 - i) + 1] for i in range(len(sizes))]
    rest, inner, pitch = index, torch.zeros_like(index), 1
    inside = torch.ones_like(index, dtype=torch.bool)
    for size, low, high in reversed(list(zip(sizes, before, after, strict=True))):
        wide = size + low + high
        place, rest = rest % wide - low, rest // wide
        inside &= (place >= 0) & (place < size)
        inner, pitch = inner + place.clamp(0, size - 1) * pitch, pitch * size
    return inner, inside.to(x.dtype)


def _pads(layer: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Padding as torch.nn.functional.pad wants it: last axis first, before and after."""
    if layer.padding == "valid":
        return [0] * (2 * len(layer.kernel_size))
    if layer.padding == "same":
        sizes = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [p for s in reversed(sizes) for p in (s // 2, s - s // 2)]
    return [int(p) for p in reversed(layer.padding) for _ in range(2)]


def _positions(layer: nn.Conv1d | nn.Conv2d, x: Tensor, wanted: int, seed: int) -> Tensor:
    """(S, taps) indices of the pixels under the kernel at S output positions."""
    pads = _pads(layer)[::-1]
    sizes = [n + pads[2 * i] + pads[2 * i + 1] for i, n in enumerate(x.shape[2:])]
    steps = zip(sizes, layer.kernel_size, layer.dilation, layer.stride, strict=True)
    starts, taps, pitch = (
        torch.zeros(1, 1, dtype=torch.long),
        torch.zeros(1, 1, dtype=torch.long),
        1,
    )
    rows = list(steps)
    for i, (size, k, d, stride) in enumerate(rows):
        pitch = math.prod(sizes[i + 1 :])
        out = (size - d * (k - 1) - 1) // stride + 1
        starts = (starts.view(-1, 1) + torch.arange(out) * stride * pitch).view(-1, 1)
        taps = (taps.view(-1, 1) + torch.arange(k) * d * pitch).view(1, -1)
    if len(starts) > wanted:
        generator = torch.Generator().manual_seed(seed)
        starts = starts[torch.randperm(len(starts), generator=generator)[:wanted]]
    return starts + taps
