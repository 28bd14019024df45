"""The damage of quantizing one layer, measured: one layer at a time, and all but one.

Everything that the variants have in common is computed once (``rewriter.sensitivity.shared_prefix``): with
L equal layers one pass over all of them costs about L / 2 forward passes instead of L quantized
ones, and nothing is prepared or converted for a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewriter.damage.fidelity import Fidelity
from rewriter.graph import facts
from rewriter.sensitivity.shared_prefix import LARGEST_BLOCK, Forks, Variant

# (flat outputs, targets) -> (N,) contribution of each sample; the metric is their mean
Metric = Callable[[list[Tensor], Any], Tensor]
# Outputs of all variants of a block are kept up to this many bytes until the float network's are
# there.
KEPT_OUTPUTS = 32 << 20


def batch_size(forks: Forks, largest: int = 16) -> int:
    """Samples in a batch: as many as keep the widest value in one block that the allocator reuses.

    A batch that leaves the cache costs more than its larger kernels save: on one CPU 16 samples
    took 1.35 ms each and 25 took 3.8 ms.
    """
    widest = 1
    for node in forks.nodes:
        shape = facts.SHAPE.get(node)
        if isinstance(shape, (tuple, torch.Size)) and all(isinstance(s, int) for s in shape):
            widest = max(widest, math.prod(shape))
    return max(1, min(largest, LARGEST_BLOCK // (4 * widest)))


def measure(
    forks: Forks,
    fidelity: Fidelity,
    inputs: Tensor,
    base: Variant,
    variants: Mapping[str, Variant],
    targets: Any = None,
    metric: Metric | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each variant does to one batch, compared with the float network.

    Args:
        forks: the network.
        fidelity: the damage.
        inputs: (N, ...) one batch.
        base: what the variants have in common.
        variants: by name.
        targets: N targets, for ``metric``.
        metric: contribution of each sample to the task's metric.

    Yields:
        Name and, as plain JSON values with N entries each, "damage", "signal", "noise" (energies)
        and "metric" (or None).
    """
    names = list(variants)
    walk = forks.walk((inputs,), base, [variants[n] for n in names])
    small = forks.output_bytes(len(inputs)) * len(names) <= KEPT_OUTPUTS
    if not base and small:  # the base is the float network: its outputs come at the end
        found = dict(walk)
        for i, name in enumerate(names):
            yield name, _score(fidelity, found[-1], found[i], targets, metric)
        return
    reference = forks.run((inputs,), {})
    left = len(names)
    for i, result in walk:
        if i >= 0:
            yield names[i], _score(fidelity, reference, result, targets, metric)
            left -= 1
        if not left:
            return


def _score(
    fidelity: Fidelity,
    reference: list[Tensor],
    found: list[Tensor],
    targets: Any,
    metric: Metric | None,
) -> dict[str, Any]:
    signal, noise = fidelity.noise(found, reference)
    values = None
    if metric is not None and targets is not None:
        on_cpu = [o.cpu() for o in found]  # where the targets are
        values = torch.as_tensor(metric(on_cpu, targets)).double().flatten().tolist()
    return {
        "damage": fidelity.damage(found, reference).tolist(),
        "signal": signal.tolist(),
        "noise": noise.tolist(),
        "metric": values,
    }


@dataclass
class Tally:
    """Results of one variant by block of samples."""

    blocks: dict[int, Mapping[str, Any]] = field(default_factory=dict[int, Mapping[str, Any]])

    def _all(self, name: str) -> list[float]:
        return [v for b in sorted(self.blocks) for v in self.blocks[b][name] or ()]

    def by_block(self, name: str) -> dict[int, list[float]]:
        """One of the results on each sample, by block."""
        return {b: list(self.blocks[b][name] or ()) for b in sorted(self.blocks)}

    @property
    def samples(self) -> int:
        return len(self._all("damage"))

    @property
    def damage(self) -> float:
        """Mean over the samples."""
        values = self._all("damage")
        return math.fsum(values) / len(values)

    @property
    def error(self) -> float:
        """Standard error of the damage, infinite for one sample."""
        values, mean = self._all("damage"), self.damage
        if len(values) < 2:
            return math.inf
        variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
        return math.sqrt(variance / len(values))

    def upper(self, errors: float) -> float:
        """The damage plus so many standard errors of it."""
        return self.damage + errors * self.error

    @property
    def noise_ratio(self) -> float:
        """Energy of the error relative to that of the float outputs."""
        return math.fsum(self._all("noise")) / max(math.fsum(self._all("signal")), 1e-300)

    @property
    def metric(self) -> float | None:
        """Mean of the metric, None where there are no targets."""
        values = self._all("metric")
        return math.fsum(values) / len(values) if values else None

    def drop(self, float_: Tally, higher_is_better: bool) -> float | None:
        """How much worse the metric is than the float network's on the same samples."""
        paired = [
            (x, y)
            for b, mine in self.blocks.items()
            if b in float_.blocks
            for x, y in zip(mine["metric"] or (), float_.blocks[b]["metric"] or (), strict=True)
        ]
        if not paired:
            return None
        lost = math.fsum(y - x for x, y in paired) / len(paired)
        return lost if higher_is_better else -lost
