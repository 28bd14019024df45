"""What fine-tuning trains on and is judged by: two disjoint parts of one data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from rewriter.storage import Digest
from search.config.schema import Config, ConfigError, FinetuneConfig
from search.data.datasets import Data, batches
from search.data.images import Samples
from search.data.user_code import call_factory

IN_MEMORY = 1 << 30  # bytes of inputs that are decoded once
MIN_INPUTS, JUDGES = 4, 512
SEEN = 8  # samples that stand for a data set in its digest


class Kept:
    """A data set whose samples are kept once they were read, as far as memory allows."""

    def __init__(self, dataset: Samples, limit: int = IN_MEMORY) -> None:
        self.dataset, self.left = dataset, limit
        self.known: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index in self.known:
            return self.known[index]
        found = self.dataset[index]
        x = _inputs_of(found)
        size = x.numel() * x.element_size()
        if size <= self.left:
            self.left -= size
            self.known[index] = found
        return found


@dataclass(frozen=True)
class Pool:
    """The inputs of a training.

    Attributes:
        dataset: Inputs, or (input, target) pairs.
        training: Indices of those that train.
        validation: Indices of those that judge.
        digest: Says which data set it is.
    """

    dataset: Samples
    training: np.ndarray[Any, np.dtype[np.intp]]
    validation: np.ndarray[Any, np.dtype[np.intp]]
    digest: str

    def batch(self, random: np.random.Generator, size: int) -> tuple[Tensor, Any]:
        """Some training inputs, (size, ...), and their targets where there are any."""
        size = min(size, len(self.training))
        chosen = random.choice(self.training, size, replace=False, shuffle=False)
        return next(self._read(chosen.tolist(), size))

    def judges(self, size: int) -> Iterator[tuple[Tensor, Any]]:
        """All inputs that judge, in batches."""
        return self._read(self.validation.tolist(), size)

    def _read(self, index: list[int], size: int) -> Iterator[tuple[Tensor, Any]]:
        for batch in batches(Subset(self.dataset, index), size):  # pyright: ignore[reportArgumentType]
            yield batch if isinstance(batch, tuple) else (batch, None)


def pool_of(cfg: Config, data: Data) -> Pool:
    """The inputs that a config trains on, apart from those that evaluate.

    Raises:
        ConfigError: there are too few, or no labels where the loss needs them.
    """
    options = cfg.finetune
    name, dataset = _source(cfg, data)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        kind = type(dataset).__name__
        raise ConfigError(f"{name}: no map-style data set (len() and []): {kind}")
    if len(dataset) < MIN_INPUTS:
        raise ConfigError(
            f"{name}: at least {MIN_INPUTS} inputs are needed to train: {len(dataset)}"
        )
    first = next(batches(Subset(dataset, [0]), 1))  # pyright: ignore[reportArgumentType]
    if options.loss == "labels" and not isinstance(first, tuple):
        raise ConfigError(
            f"finetune.loss: labels: {name} has none; use distillation, which needs no labels"
        )
    x = first[0] if isinstance(first, tuple) else first
    wanted = tuple(data.calibration[0].shape)
    if not isinstance(x, Tensor) or tuple(x.shape[1:]) != wanted:
        shape = tuple(x.shape[1:]) if isinstance(x, Tensor) else type(x).__name__
        raise ConfigError(f"{name}: inputs must have the network's shape {wanted}: {shape}")
    order = np.random.default_rng([options.seed, 1]).permutation(len(dataset))
    judges = min(JUDGES, max(1, round(options.validation * len(dataset))))
    steady = _steady(dataset)
    kept = Kept(dataset) if steady else dataset
    return Pool(kept, order[judges:], order[:judges], _digest(dataset, options, steady))


def has_labels(cfg: Config, data: Data) -> bool:
    """Whether what a config trains on has labels."""
    return isinstance(_source(cfg, data)[1][0], tuple | list)


def _source(cfg: Config, data: Data) -> tuple[str, Samples]:
    own = cfg.finetune.inputs
    if own is not None:
        return "finetune.inputs", call_factory(cfg, "finetune.inputs", own.factory, own.args)
    if data.training is not None:
        return "data.training", data.training
    return "data.calibration", data.calibration


def _steady(dataset: Samples) -> bool:
    """Whether a sample is the same each time; not so where the user's data set cuts out or mirrors at random."""
    found = [_inputs_of(dataset[i]) for i in (0, len(dataset) // 2) for _ in range(2)]
    return torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])


def _inputs_of(sample: Any) -> Tensor:
    return sample[0] if isinstance(sample, tuple | list) else sample


def _digest(dataset: Samples, options: FinetuneConfig, steady: bool) -> str:
    """Hash of the options and of a few samples; all of them would be read for nothing else.

    Of samples that are another each time, the targets alone.
    """
    digest = Digest()
    digest.add(sorted(options.model_dump(exclude={"plans"}).items(), key=str))
    digest.add(len(dataset))
    for i in np.linspace(0, len(dataset) - 1, SEEN).astype(int).tolist():
        found = dataset[i]
        parts = tuple(found) if isinstance(found, tuple | list) else (found,)
        digest.add(parts if steady else parts[1:])
    digest.add(torch.__version__)
    return digest.hex()
