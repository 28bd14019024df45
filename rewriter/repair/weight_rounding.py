"""Rounding of weights that minimises the error of a layer's output, not of the weights.

With X the inputs as the int8 kernel sees them, H = X X^T, and W* the weights that would reproduce the float layer on X, the rounded
weights Q minimise tr((Q - W*) H (Q - W*)^T): column by column, the error of each column being made good by those not
yet rounded, then by coordinate descent until nothing changes. Closed form: no gradient, seconds for a network.
Source: Frantar et al., 2022 (arXiv:2210.17323); Behdin et al., 2023 (arXiv:2309.01885) for the descent;
Nagel et al., 2020 (arXiv:2004.10568) for why nearest is not best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewriter.int8.integer_grid import on_grid

# Share of the mean diagonal that is added to H, and more where few positions stand against many weights: keeps directions that the
# inputs hardly took near the float weights. On inputs that H was not made of, less of it loses up to 40 % there and gains 1 % elsewhere.
DAMPING = 0.1
# Columns that are rounded before their errors are passed on to all others in one product.
BLOCK = 64
# Sweeps of coordinate descent; a second and third change few weights, and the outputs not at all.
SWEEPS = 1
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
    """Accumulates ``Moments`` in two halves, about the first batch's mean: so they stay precise in the inputs' own type."""

    def __init__(self) -> None:
        self.center: tuple[Tensor, Tensor] | None = None
        self.sums: list[list[Tensor]] = [[], []]
        self.places = [0, 0]

    def add(self, exact: Tensor, rounded: Tensor, half: int = 0) -> None:
        """Add columns (G, K, positions) of the float input and of the int8 input to one half."""
        if self.center is None:
            self.center = exact.mean(2, keepdim=True), rounded.mean(2, keepdim=True)
        x, y = exact - self.center[0], rounded - self.center[1]
        new = [y @ y.transpose(1, 2), x @ y.transpose(1, 2), x.sum(2), y.sum(2)]
        old = self.sums[half]
        self.sums[half] = [a.add_(b) for a, b in zip(old, new, strict=True)] if old else new
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
    halves = sums.halves()
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
    return weight + _Ridge(weight, sums.moments()).change(best)


class _Ridge:
    """Ridge regression on some moments; in float32, which the ridge makes precise enough, at half the time of float64."""

    def __init__(self, weight: Tensor, moments: Moments) -> None:
        self.hessian = moments.hessian.float()
        self.wanted = weight.float() @ (moments.cross - moments.hessian).float()

    def change(self, share: float) -> Tensor:
        """(G, O, K) what is added to the weights, with a share of the mean diagonal as the ridge."""
        factor = _factor(_ridge(self.hessian, share))
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


def _factor(h: Tensor) -> Tensor:
    """Cholesky factor of H, which becomes a multiple of the identity where float32 holds it for indefinite.

    It may so hold that of a channel that never varies. Edits H.
    """
    factor, info = torch.linalg.cholesky_ex(h)
    bad = info > 0
    if bool(bad.any()):
        level = h[bad].diagonal(dim1=1, dim2=2).abs().mean(1).clamp_min(1e-12).view(-1, 1, 1)
        h[bad] = torch.eye(h.shape[1]).to(h) * level
        factor[bad] = torch.eye(h.shape[1]).to(h) * level.sqrt()
    return factor


def round_weights(
    weight: Tensor,
    scale: Tensor,
    hessian: Tensor,
    qmin: int,
    qmax: int,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
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
    inverse = torch.cholesky_inverse(_factor(h))
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
        q = on_grid(w, step, qmin, qmax)
        error = _loss(q, w, h).double()
        if shared:
            error = error.sum().expand_as(error)
        better = error < least
        best = torch.where(better[..., None], scale, best)
        least = torch.where(better, error, least)
    return best
