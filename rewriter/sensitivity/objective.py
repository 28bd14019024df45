"""How far a network's outputs are from the float network's, for each sample.

Class outputs: the Kullback-Leibler divergence KL(float || int8). Other outputs (boxes, scores of
frames): the squared error relative to the energy of the float output, averaged over output groups,
so that a score in [0, 1] counts as much as a box in [0, 640]. A group is one output tensor, or a
set of channels of alike size within it.

Both are quadratic near the float network, with a known Hessian; ``probe`` draws r with E[r r^T] =
Hessian, so that E[(r . change)^2] is the damage. Source: Hutchinson, 1990
(doi:10.1080/03610919008812866) for the random projections; Martens, 2020 (arXiv:1412.1193) for the
Fisher matrix as the curvature of the divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["classes", "values"]
# Channels whose sizes differ by more than this factor are groups of their own.
SPREAD = 8.0
TINY = 1e-30


@dataclass
class Objective:
    """The measure of damage for one network.

    Args:
        kind: what the outputs are.
        probabilities: class outputs that are probabilities, not logits.
        groups: for values: for each output, its group of channels as (axis, (C,) group numbers).
        energy: for values: for each output, (groups,) mean energy of a sample in the float
            network.
    """

    kind: Kind
    probabilities: bool = False
    groups: list[tuple[int, Tensor]] = field(default_factory=list)
    energy: list[Tensor] = field(default_factory=list)

    @staticmethod
    def of(reference: Sequence[Tensor], kind: Kind | None = None) -> Objective:
        """The measure that suits outputs like ``reference``, the float network's on a few samples.

        Args:
            reference: flat outputs, each (N, ...).
            kind: None: one output of shape (N, C), C > 1, holds classes; anything else values.
        """
        floats = [r for r in reference if r.is_floating_point()]
        if kind is None:
            alone = len(reference) == 1 and reference[0].ndim == 2 and reference[0].shape[1] > 1
            kind = "classes" if alone and len(floats) == 1 else "values"
        if kind == "classes":
            rows = reference[0]
            sums = rows.sum(1)
            probabilities = bool((rows >= 0).all()) and bool(((sums - 1).abs() < 1e-4).all())
            return Objective("classes", probabilities)
        groups = [_groups(r) for r in reference]
        energy = [
            _group_energy(r, axis, number).mean(0).cpu()
            for r, (axis, number) in zip(reference, groups, strict=True)
        ]
        return Objective("values", False, groups, energy)

    @property
    def count(self) -> int:
        """Number of output groups with any energy."""
        return max(sum(int((e > TINY).sum()) for e in self.energy), 1)

    def damage(self, reference: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
        """(N,) float64 damage of each sample."""
        if self.kind == "classes":
            p, q = self._logs(reference[0]), self._logs(found[0])
            return (p.exp() * (p - q)).sum(1).clamp_min(0).cpu()
        total = torch.zeros(len(reference[0]), dtype=torch.float64)
        for r, f, (axis, number), energy in zip(
            reference, found, self.groups, self.energy, strict=True
        ):
            error = _group_energy(f.double() - r.double(), axis, number).cpu()
            used = energy > TINY
            total += (error[:, used] / energy[used].double()).sum(1)
        return total / self.count

    def noise(self, reference: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(N,) energies of the float outputs and of the error, groups weighted alike."""
        if self.kind == "values":
            damage = self.damage(reference, found)
            return torch.ones_like(damage), damage
        r, f = reference[0].double(), found[0].double()
        return (r**2).sum(1).cpu(), ((f - r) ** 2).sum(1).cpu()

    def probe(self, output: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """One random direction in output space, for each sample and output, shaped as ``output``.

        For classes E[r r^T] is half the Fisher matrix (the gradient is with respect to the
        logits), for values the diagonal of 1 / (groups x energy).
        """
        signs = [_signs(o.shape, generator).to(o.device) for o in output]
        if self.kind == "classes":
            p = self._logs(output[0].detach()).exp()
            root = p.sqrt()
            # F = diag(p) - p p^T = B B^T with B = diag(sqrt p) - p sqrt(p)^T
            r = root * signs[0] - p * (root * signs[0]).sum(1, keepdim=True)
            return [(r * 0.5**0.5).to(output[0].dtype)]
        found = []
        for o, s, (axis, number), energy in zip(
            output, signs, self.groups, self.energy, strict=True
        ):
            weight = torch.where(energy > TINY, (energy * self.count).clamp_min(TINY).rsqrt(), 0.0)
            wide = [1] * o.ndim
            wide[axis] = -1
            found.append((s * weight[number].view(wide).to(o.device)).to(o.dtype))
        return found

    def scalar(self, output: Sequence[Tensor], probe: Sequence[Tensor]) -> Tensor:
        """The sum over samples of probe . output, to be differentiated."""
        if self.probabilities:
            output = [output[0].clamp_min(1e-12).log()]
        parts = [(o * r).sum() for o, r in zip(output, probe, strict=True) if o.requires_grad]
        return torch.stack(parts).sum()

    def project(
        self, reference: Sequence[Tensor], change: Sequence[Tensor], probe: Sequence[Tensor]
    ) -> Tensor:
        """(N,) float64 probe . change for a change made at the outputs themselves."""
        if self.probabilities:
            change = [change[0] / reference[0].clamp_min(1e-12)]
        total = torch.zeros(len(reference[0]), dtype=torch.float64)
        for c, r in zip(change, probe, strict=True):
            total += (c.double() * r.double()).flatten(1).sum(1).cpu()
        return total

    def _logs(self, output: Tensor) -> Tensor:
        rows = output.double()
        return (rows.clamp_min(1e-12).log() if self.probabilities else rows).log_softmax(1)


def _signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8) * 2.0 - 1.0


def _size_along(output: Tensor, axis: int) -> Tensor:
    """(C,) root mean square of each slice along an axis."""
    rest = [d for d in range(output.ndim) if d != axis]
    return output.double().pow(2).mean(rest).sqrt().cpu()


def _groups(output: Tensor) -> tuple[int, Tensor]:
    """The channel axis of an output and the group of each channel."""
    if output.ndim < 2 or not output.is_floating_point():
        return 0, torch.zeros(output.shape[0] if output.ndim == 0 else 1, dtype=torch.long)
    best_axis, best_size, best_spread = 1, _size_along(output, 1), -1.0
    for axis in range(1, output.ndim):
        size = _size_along(output, axis)
        alive = size[size > TINY]
        spread = float((alive.max() / alive.min()).log()) if len(alive) else 0.0
        if spread > best_spread + 0.1:  # the first of equals: channels come before places
            best_axis, best_size, best_spread = axis, size, spread
    order = best_size.argsort(stable=True)
    number = torch.zeros(len(best_size), dtype=torch.long)
    current, start = 0, None
    for c in order.tolist():
        size = float(best_size[c])
        if start is not None and size > SPREAD * max(start, TINY):
            current, start = current + 1, size
        elif start is None and size > TINY:
            start = size
        number[c] = current
    return best_axis, number


def _group_energy(output: Tensor, axis: int, number: Tensor) -> Tensor:
    """(N, groups) energy of each sample in each group."""
    rows = output.double().pow(2)
    if axis == 0:
        return rows.reshape(len(output), -1).sum(1, keepdim=True)
    rest = [d for d in range(1, output.ndim) if d != axis]
    channels = rows.sum(rest) if rest else rows
    groups = int(number.max()) + 1
    found = torch.zeros(len(output), groups, dtype=torch.float64, device=output.device)
    return found.index_add(1, number.to(output.device), channels)
