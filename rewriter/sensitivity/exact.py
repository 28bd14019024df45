"""The damage of quantizing one layer, measured: one layer at a time, and all but one.

Everything that the variants have in common is computed once (``rewriter.sensitivity.forks``): with L equal layers one pass over all of them
costs about L / 2 forward passes instead of L quantized ones, and nothing is prepared or converted for a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.sensitivity.forks import Forks, Variant
from rewriter.sensitivity.objective import Objective

# (outputs, targets) -> (N,) contribution of each sample; the metric is their mean
Metric = Callable[[list[Tensor], list[object]], Tensor]


@dataclass(frozen=True)
class Block:
    """What one variant did to one block of samples; all lists have one entry for each sample."""

    damage: list[float]
    signal: list[float]
    noise: list[float]
    metric: list[float] | None


def batch_size(forks: Forks, largest: int = 16) -> int:
    """Samples in a batch: as many as keep the widest value in one block that the allocator reuses.

    A batch that leaves the cache costs more than its larger kernels save: on one CPU 16 samples took 1.35 ms each and 25
    took 3.8 ms.
    """
    from rewriter.sensitivity.forks import LARGEST_BLOCK

    widest = 1
    for node in forks.nodes:
        shape = node.meta.get("shape")
        if isinstance(shape, (tuple, torch.Size)) and all(isinstance(s, int) for s in shape):
            widest = max(widest, torch.Size(shape).numel())
    return max(1, min(largest, LARGEST_BLOCK // (4 * widest)))


def measure(
    forks: Forks,
    objective: Objective,
    inputs: Tensor,
    targets: Sequence[object] | None,
    base: Variant,
    variants: Mapping[str, Variant],
    metric: Metric | None = None,
) -> Iterator[tuple[str, Block]]:
    """Damage of each variant on one batch of inputs.

    Args:
        forks: the network.
        objective: measure of damage, relative to the float network.
        inputs: (N, ...) one batch.
        targets: N targets, or None.
        base: what the variants have in common.
        variants: by name.
        metric: contribution of each sample to the task's metric.

    Yields:
        Name and result, in the order in which the network computes them; "" is the base itself.
    """
    reference = forks.run((inputs,), {})
    names = list(variants)
    for i, found in forks.walk((inputs,), base, [variants[n] for n in names]):
        yield "" if i < 0 else names[i], score(objective, reference, found, targets, metric)


def score(
    objective: Objective,
    reference: list[Tensor],
    found: list[Tensor],
    targets: Sequence[object] | None,
    metric: Metric | None,
) -> Block:
    """One block's damage, signal and noise energy, and metric where there are targets."""
    signal, noise = objective.noise(reference, found)
    values = None
    if metric is not None and targets is not None:
        values = torch.as_tensor(metric(found, list(targets))).double().flatten().tolist()
    return Block(
        objective.damage(reference, found).tolist(), signal.tolist(), noise.tolist(), values
    )
