"""What a user has in memory, as the splits that a run works on: tensors, arrays, data sets, loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset, default_collate

from search.config.schema import ConfigError
from search.data.datasets import Data, Inputs, check_splits
from search.data.images import Samples

HELD_OUT = 3  # without evaluation data, every third input is kept apart to evaluate


@dataclass(frozen=True)
class Stacked:
    """Inputs that are one tensor (n, ...), with n targets or without."""

    x: Tensor
    y: Any = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int, /) -> Any:
        return self.x[index] if self.y is None else (self.x[index], self.y[index])


@dataclass(frozen=True)
class Converted:
    """A data set whose inputs may be NumPy arrays or in another float type."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int, /) -> Any:
        item = self.dataset[index]
        if isinstance(item, tuple | list) and len(item) == 2:
            return _float(item[0]), item[1]
        return _float(item)


def data_of(calibration: Any, evaluation: Any = None, *, video: bool = False) -> Data:
    """The splits of a run.

    Args:
        calibration: A tensor or array (n, ...), a tuple of inputs and targets, a map-style data set, a list of samples or of
            batches, or a loader. Targets are not used to calibrate.
        evaluation: The same. None: every third calibration sample is kept apart to evaluate, with its target where there
            is one.
        video: Whether a sample is a sequence, (T, C, H, W).

    Raises:
        ConfigError: it is none of these, is empty, or its samples have another form.
    """
    seen = dataset_of(calibration, "calibration", video)
    if evaluation is None:
        held = range(HELD_OUT - 1, len(seen), HELD_OUT)
        if not held:
            raise ConfigError(
                f"calibration: {len(seen)} samples are too few to keep some apart: give evaluation data"
            )
        judged = _some(seen, list(held))
        seen = _some(seen, [i for i in range(len(seen)) if i not in set(held)])
    else:
        judged = dataset_of(evaluation, "evaluation", video)
    if len(seen) and _paired(seen[0]):
        seen = Inputs(seen)
    data = Data(seen, judged)
    check_splits(data, Path.cwd(), "(T, C, H, W)" if video else "(C, H, W)")
    return data


def dataset_of(given: Any, name: str, video: bool = False) -> Samples:
    """What was given as a map-style data set, in an order that is the same each time.

    Raises:
        ConfigError: it is nothing of the kind.
    """
    if isinstance(given, Tensor | np.ndarray):
        return Stacked(_float(given))
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor | np.ndarray):
        return _pairs(given[0], given[1], name)
    if isinstance(given, DataLoader):
        return _unbatched(_batches_of(given), name)
    if isinstance(given, Sequence) and len(given) and _is_batch(given[0], video):
        return _unbatched(given, name)
    if hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        return Converted(given)
    if isinstance(given, Iterable):
        return _unbatched(given, name)
    kind = type(given).__name__
    raise ConfigError(f"{name}: must be a tensor, a data set or a DataLoader: {kind}")


def _pairs(x: Any, y: Any, name: str) -> Stacked:
    if len(x) != len(y):
        raise ConfigError(f"{name}: {len(x)} inputs for {len(y)} targets")
    return Stacked(_float(x), torch.as_tensor(y) if isinstance(y, np.ndarray) else y)


def _batches_of(loader: DataLoader[Any]) -> Iterable[Any]:
    """The batches of a loader, in the order of its data set: a loader that shuffles would give another run each time."""
    sampler: Any = loader.sampler
    in_order = isinstance(sampler, SequentialSampler | RandomSampler)
    if not in_order or loader.batch_size is None or not hasattr(loader.dataset, "__getitem__"):
        return loader
    dataset: Any = loader.dataset
    count, size, collate = len(dataset), loader.batch_size, loader.collate_fn
    if collate is default_collate:
        return _Whole(dataset)
    rows = ([dataset[i] for i in range(a, min(a + size, count))] for a in range(0, count, size))
    return (collate(row) for row in rows)


class _Whole:
    """A data set that a loader would only stack: it is used as it is, and read when it is needed."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _unbatched(batches: Iterable[Any], name: str) -> Samples:
    """The samples of batches, in memory."""
    if isinstance(batches, _Whole):
        return Converted(batches.dataset)
    found: list[Any] = []
    for batch in batches:
        if isinstance(batch, tuple | list) and len(batch) == 2:
            x, y = batch
            if len(x) != len(y):
                raise ConfigError(f"{name}: a batch has {len(x)} inputs for {len(y)} targets")
            found += [(_float(a), b) for a, b in zip(x, y, strict=True)]
        elif isinstance(batch, tuple | list) and len(batch) == 1:
            found += [_float(x) for x in batch[0]]
        elif isinstance(batch, Tensor | np.ndarray):
            found += list(_float(batch))
        else:
            kind = type(batch).__name__
            raise ConfigError(
                f"{name}: a batch must be a tensor (n, ...) or (inputs, targets): {kind}"
            )
    return _Listed(found)


class _Listed(list[Any]):
    """Samples in memory."""


def _is_batch(first: Any, video: bool) -> bool:
    """Whether the elements of a list are batches and not samples."""
    x = first[0] if isinstance(first, tuple | list) and len(first) else first
    return isinstance(x, Tensor | np.ndarray) and x.ndim == (5 if video else 4)


def _some(dataset: Samples, index: list[int]) -> Samples:
    return Converted(Subset(dataset, index))  # pyright: ignore[reportArgumentType]


def _paired(sample: Any) -> bool:
    return isinstance(sample, tuple | list) and len(sample) == 2


def _float(x: Any) -> Any:
    """A float tensor as float32; anything else as it is, so that the check of the splits names it."""
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().cpu().float()
    return x
