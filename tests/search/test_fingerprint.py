from __future__ import annotations

import pytest
import torch

from search.fingerprint import Digest


def digest(value: object) -> str:
    made = Digest()
    made.add(value)
    return made.hex()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool, torch.bfloat16])
def test_the_memory_order_of_a_tensor_does_not_count(dtype: torch.dtype) -> None:
    table = torch.arange(15).view(3, 5).to(dtype)
    assert digest(table[:1, 2]) == digest(table[:1, 2].clone().view(1))  # a stride of 5
    assert digest(table.T) == digest(table.T.contiguous())
    assert digest(table) != digest(table.T)


def test_values_types_and_nesting_count() -> None:
    assert digest(torch.tensor([1.0])) != digest(torch.tensor([2.0]))
    assert digest(torch.tensor([1.0])) != digest(torch.tensor([[1.0]]))
    assert digest([1, [2]]) != digest([[1], 2])
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(torch.tensor(3)) != digest(3)
