"""The evaluation samples of a run, decoded once where they fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewriter.storage import Digest
from search.config.schema import ConfigError
from search.data.datasets import batches
from search.data.images import Samples as Dataset
from search.data.overlap import mark

IN_MEMORY = 2 << 30  # bytes; more inputs than that are decoded again for each plan
BATCH = 32
MIN_HELD_BACK_SAMPLES = (
    300  # with fewer samples than these none is held back unless the config says so
)
HELD_BACK = 1 / 3
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class SampleSet:
    """The evaluation samples, decoded once where they fit into memory.

    Attributes:
        dataset: Where they are read from.
        count: Number of samples.
        inputs: (n, ...) all inputs, None where they are read again each time.
        targets: n targets, None without labels.
        digest: Hash of all inputs and targets.
        order: (n,) which sample of the data set each one is.
        marks: n marks in the data set's order, by which inputs are found again; see `mark`.
    """

    dataset: Dataset
    count: int
    inputs: Tensor | None
    targets: Any
    digest: str
    order: NDArray[np.intp]
    marks: list[bytes] = field(default_factory=list[bytes], repr=False)

    def batches(
        self, size: int = BATCH, start: int = 0, stop: int | None = None
    ) -> Iterator[Tensor]:
        """The inputs from `start` up to `stop` in order, (size, ...) each.

        Raises:
            ConfigError: the data set fails on a sample.
        """
        stop = self.count if stop is None else stop
        if start >= stop:
            return
        if self.inputs is not None:
            yield from self.inputs[start:stop].split(size)
            return
        chosen = _Chosen(self.dataset, self.order[start:stop].tolist())
        for batch in batches(chosen, size):
            yield batch[0] if isinstance(batch, tuple) else batch


@dataclass(frozen=True)
class _Chosen:
    """Some samples of a data set, in an order of their own."""

    dataset: Dataset
    index: Sequence[int]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int, /) -> Any:
        return self.dataset[self.index[position]]


def check_outputs(outputs: Sequence[Tensor], count: int) -> None:
    """See that the float network's outputs are finite and have a row for each of `count` inputs.

    Raises:
        ConfigError: they do not.
    """
    for i, output in enumerate(outputs):
        if output.ndim == 0 or len(output) != count:
            shape = tuple(output.shape)
            fact = f"{count} inputs give {shape}: its size depends on their values, or it has no batch"
            raise ConfigError(f"model: output {i} has no row for each input: {fact}")
        if output.is_floating_point():
            finite = torch.isfinite(output).flatten(1).all(1)
            if not bool(finite.all()):
                first, bad = int((~finite).nonzero()[0]), int((~finite).sum())
                raise ConfigError(
                    f"model: output {i} of the float network is NaN or infinite for {bad} of {count} "
                    f"evaluation samples, such as number {first}"
                )


def shuffled(count: int) -> NDArray[np.intp]:
    """(count,) an order in which every part is like the whole; the same for every run and seed."""
    return np.random.default_rng(0).permutation(count)


def chosen_on(count: int, fraction: float | None = None) -> int:
    """How many of `count` samples choose among plans; the others are held back to confirm.

    Args:
        count: Number of samples.
        fraction: Share that is held back. None: a third of them where they are enough.
    """
    if fraction is None:
        fraction = HELD_BACK if count >= MIN_HELD_BACK_SAMPLES else 0.0
    return max(1, count - round(fraction * count))


def load_samples(
    dataset: Dataset,
    tick: Tick = lambda done, total: None,
    limit: int = IN_MEMORY,
    order: NDArray[np.intp] | None = None,
) -> SampleSet:
    """Read a data set once: inputs, or (input, target) pairs.

    Args:
        dataset: Where they are.
        tick: Told how far it is.
        limit: Bytes of inputs that are kept in memory; where they are more, they are read again
            each time.
        order: (n,) the order of the samples; None: as they are in the data set.
    """
    total = len(dataset)
    order = np.arange(total) if order is None else order
    place = torch.from_numpy(np.argsort(order))
    digest = Digest()
    marks: list[bytes] = []
    inputs: Tensor | None = None
    targets: list[Any] = []
    done = 0
    for batch in batches(dataset, BATCH):
        x, y = batch if isinstance(batch, tuple) else (batch, None)
        if done == 0 and total * x[0].numel() * x.element_size() <= limit:
            inputs = torch.empty(total, *x.shape[1:], dtype=x.dtype)
        if inputs is not None:
            inputs[place[done : done + len(x)]] = x
        if y is not None:
            targets.append(y)
        digest.add((x, y))
        marks += map(mark, x)
        done += len(x)
        tick(done, total)
    return SampleSet(dataset, total, inputs, _join(targets, order), digest.hex(), order, marks)


def _join(targets: list[Any], order: NDArray[np.intp]) -> Any:
    if not targets:
        return None
    if all(isinstance(t, Tensor) for t in targets):
        return torch.cat(targets)[torch.from_numpy(order)]
    flat = [item for part in targets for item in part]
    return [flat[i] for i in order]
