"""What a user may have in memory becomes the same splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import quantfix
from quantfix._inputs import data_of, dataset_of

X = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(10)


class Pairs:
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return X[index].numpy(), int(Y[index])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


def collate(rows: list[Any]) -> tuple[Tensor, list[int]]:
    return torch.stack([torch.as_tensor(x) for x, _ in rows]), [int(y) for _, y in rows]


# no Dataset by its class, but torch takes what has a length and items
PAIRS: Any = Pairs()

FORMS: dict[str, Any] = {
    "a tuple": (X, Y),
    "arrays": (X.numpy(), Y.numpy()),
    "double": (X.double(), Y),
    "a list of targets": (X, Y.tolist()),
    "a data set": TensorDataset(X, Y),
    "a data set of arrays": Pairs(),
    "a loader": DataLoader(TensorDataset(X, Y), 4),
    "a loader that shuffles": DataLoader(TensorDataset(X, Y), 4, shuffle=True),
    "a loader that collates": DataLoader(PAIRS, 4, shuffle=True, collate_fn=collate),
    "a loader of a stream": DataLoader(Stream(), 4),
    "samples": list(zip(X, Y, strict=True)),
    "batches": [(X[:6], Y[:6]), (X[6:], Y[6:])],
    "a generator": ((X[i : i + 5], Y[i : i + 5]) for i in (0, 5)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples_in_the_same_order(form: str) -> None:
    found = dataset_of(FORMS[form], "evaluation")
    assert len(found) == 10
    for i in range(10):
        x, y = found[i]
        assert x.dtype == torch.float32 and torch.equal(x, X[i])
        assert int(y) == i


@pytest.mark.parametrize(
    "form",
    [X, X.numpy(), list(X), [X[:6], X[6:]], DataLoader(X, 3), iter([X])],  # type: ignore[arg-type]
)
def test_inputs_alone_need_no_targets(form: Any) -> None:
    found = dataset_of(form, "calibration")
    assert [torch.equal(found[i], X[i]) for i in range(len(found))] == [True] * 10


def test_a_loader_of_a_part_of_a_data_set_gives_that_part() -> None:
    loader = DataLoader(TensorDataset(X, Y), 2, sampler=SubsetRandomSampler([1, 4, 7]))
    found = dataset_of(loader, "calibration")
    assert sorted(int(found[i][1]) for i in range(len(found))) == [1, 4, 7]


def test_without_evaluation_every_third_sample_is_kept_apart() -> None:
    data = data_of((X, Y))
    assert [int(data.evaluation[i][1]) for i in range(len(data.evaluation))] == [2, 5, 8]
    assert len(data.calibration) == 7
    assert isinstance(data.calibration[0], Tensor)  # targets do not calibrate
    assert torch.equal(data.calibration[2], X[3])


def test_sequences_are_samples_of_a_video() -> None:
    frames = torch.randn(4, 5, 3, 8, 8)
    data = data_of(list(frames), (frames, torch.zeros(4, 5)), video=True)
    assert data.calibration[0].shape == (5, 3, 8, 8)


@pytest.mark.parametrize(
    ("calibration", "evaluation", "message"),
    [
        (3, None, "calibration: must be a tensor, a data set or a DataLoader: int"),
        (X, (X, Y[:4]), "evaluation: 10 inputs for 4 targets"),
        (X[:2], None, "2 samples are too few to keep some apart"),
        (X[:0], X, "data.calibration: empty"),
        (X, torch.randn(4, 3, 9, 9), "data.evaluation: inputs have the shape"),
        (X.long(), X, "inputs must be float32 tensors"),
        ([{"a": 1}], X, "inputs must be float32 tensors"),
        (iter(["a"]), X, "a batch must be a tensor"),
    ],
)
def test_what_cannot_be_used_is_named(calibration: Any, evaluation: Any, message: str) -> None:
    with pytest.raises(quantfix.ConfigError, match=message):
        data_of(calibration, evaluation)


def test_numpy_images_of_bytes_are_not_silently_scaled() -> None:
    with pytest.raises(quantfix.ConfigError, match="float32"):
        data_of(np.zeros((4, 3, 8, 8), np.uint8), X)
