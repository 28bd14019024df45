from __future__ import annotations

from typing import Any

import pytest
import torch

from search.config.schema import ConfigError
from search.data.datasets import batches


def test_batches_keep_the_order_and_the_rest() -> None:
    pairs = [(torch.full((1, 2), float(i)), i) for i in range(7)]
    found = list(batches(pairs, 3))
    assert [len(x) for x, _ in found] == [3, 3, 1]
    assert torch.cat([x for x, _ in found])[:, 0, 0].tolist() == list(range(7))
    assert torch.cat([y for _, y in found]).tolist() == list(range(7))
    assert found[0][1].dtype == torch.int64


def test_batches_of_inputs_alone_and_of_other_targets() -> None:
    x = torch.zeros(1, 2)
    assert next(iter(batches([x, x], 2))).shape == (2, 1, 2)
    frames = next(iter(batches([(x, torch.zeros(3))] * 2, 2)))[1]
    assert frames.shape == (2, 3)
    boxes = [{"boxes": torch.zeros(n, 4)} for n in (1, 2)]
    assert next(iter(batches([(x, b) for b in boxes], 2)))[1] == boxes


def test_batches_name_a_sample_that_fails_or_differs() -> None:
    with pytest.raises(ConfigError, match=r"inputs differ in shape: \(1, 2\) and \(1, 3\)"):
        list(batches([torch.zeros(1, 2), torch.zeros(1, 3)], 2))

    class Broken(list[torch.Tensor]):
        def __getitem__(self, i: Any) -> Any:
            if i == 2:
                raise ValueError("bad sample")
            return super().__getitem__(i)

    with pytest.raises(
        ConfigError, match=r"sample 2: ValueError at test_batches.py:\d+: bad sample"
    ):
        list(batches(Broken([torch.zeros(1)] * 4), 2))
