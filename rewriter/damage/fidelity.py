"""How far an int8 network is from its float model, without labels.

For class outputs: mean KL divergence. For all others: squared error relative to the energy of the float output, averaged
over output groups, so that a score in [0, 1] counts as much as a box in [0, 640].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Channels whose root mean squares lie within this factor of each other form one group.
FACTOR = 8.0


@dataclass(frozen=True)
class OutputGroups:
    """Groups along one axis of one output tensor.

    Args:
        axis: the axis of (N, ...) along which the output's meaning changes; 0 if it has none.
        group: (size of that axis,) number of each entry's group, 0..count-1.
        energy: (count,) mean square of the float output in each group.
    """

    axis: int
    group: Tensor
    energy: Tensor


def output_groups(reference: Tensor) -> OutputGroups:
    """Find the groups of an output (N, ...) by its magnitude on the float model.

    The axis is the one along which the root mean square varies most; its entries are grouped by octaves of it.
    """
    x = reference.detach().double()
    best, spread = 0, 0.0
    for axis in range(1, x.ndim):
        level = _level(x, axis)
        if len(level) > 1 and float(level.std()) > spread:
            best, spread = axis, float(level.std())
    if best == 0:
        return OutputGroups(
            0, torch.zeros(1, dtype=torch.long), _energy(x.square().mean().view(1))
        )
    level = _level(x, best)
    bins = ((level - level.min()) / torch.log(torch.tensor(FACTOR))).floor().long()
    _, group = bins.unique(return_inverse=True)
    power = x.square().mean([d for d in range(x.ndim) if d != best])
    count = int(group.max()) + 1
    total = power.new_zeros(count).index_add_(0, group, power)
    energy = total / torch.bincount(group, minlength=count)
    return OutputGroups(best, group, _energy(energy))


def _level(x: Tensor, axis: int) -> Tensor:
    """Log of the root mean square of each entry along ``axis``; silent entries count as 1e-3 of the loudest."""
    power = x.square().mean([d for d in range(x.ndim) if d != axis])
    return power.clamp_min(float(power.max()) * 1e-6 + 1e-30).log() / 2


def _energy(energy: Tensor) -> Tensor:
    return energy.clamp_min(float(energy.max()) * 1e-6 + 1e-30)


def relative_error(
    outputs: list[Tensor], reference: list[Tensor], groups: list[OutputGroups]
) -> Tensor:
    """(N,) squared error relative to the float output's energy, averaged over all groups of all outputs."""
    parts = [
        _grouped_error(found, expected, group)
        for found, expected, group in zip(outputs, reference, groups, strict=True)
    ]
    return torch.cat(parts, 1).mean(1)


def _grouped_error(found: Tensor, expected: Tensor, groups: OutputGroups) -> Tensor:
    """(N, number of groups)"""
    device = found.device
    groups = OutputGroups(groups.axis, groups.group.to(device), groups.energy.to(device))
    error = (found.double() - expected.double()).square()
    if groups.axis == 0:
        return error.flatten(1).mean(1, keepdim=True) / groups.energy
    rest = [d for d in range(1, error.ndim) if d != groups.axis]
    per_entry = error.mean(rest) if rest else error
    sums = error.new_zeros(len(error), len(groups.energy))
    sums.index_add_(1, groups.group, per_entry)
    return sums / torch.bincount(groups.group, minlength=len(groups.energy)) / groups.energy


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """(N,) float64 KL(softmax(reference) || softmax(logits)) of class logits (N, classes), in nats.

    Logits that are not finite do infinite damage, so that no ranking lets them pass.
    """
    p, q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    # a class that the reference rules out (log p = -inf) adds nothing
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    divergence = terms.sum(1).clamp_min(0.0)  # rounding can leave -1e-17
    return torch.where(divergence.isnan(), torch.inf, divergence)


def is_class_output(reference: list[Tensor], kind: str | None = None) -> bool:
    """Whether the outputs are one (N, classes) tensor of logits; ``kind`` "values" says that they are none."""
    return (
        kind != "values"
        and len(reference) == 1
        and reference[0].ndim == 2
        and reference[0].shape[1] > 1
    )


def damage(outputs: list[Tensor], reference: list[Tensor], kind: str | None = None) -> Tensor:
    """(N,) damage of each sample: KL for class outputs, grouped relative squared error for all others."""
    if is_class_output(reference, kind):
        return kl_divergence(outputs[0], reference[0])
    return relative_error(outputs, reference, [output_groups(r) for r in reference])
