"""Sums and products with a plain number in the int8 file: exactly the number, also where it is zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter import profile, quantize, target, trace
from rewriter.graph.lookup import is_call
from rewriter.int8.onnx.compare import DEPARTING_SHARE, compare


class _Numbered(nn.Module):
    def __init__(self, factor: float, term: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.factor, self.term = factor, term

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.relu(y * self.factor + y + self.term))


@pytest.mark.parametrize("number", [0.0, 1.0, 0.3, -2.0])
@pytest.mark.parametrize("name", ["onnxruntime", "per_tensor"])
def test_the_file_computes_what_the_simulation_does(number: float, name: str) -> None:
    model, x = _Numbered(number, number).eval(), torch.randn(8, 3, 12, 12)
    gm = trace(model, x[:2])
    profile(gm, [x])
    rows = compare(quantize(gm, target(name), [x]), x[:3], threads=1)
    wrong = [r for r in rows if r.differs > DEPARTING_SHARE or r.largest > 1.5]
    assert not wrong, wrong


class _Neutral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = sum([self.a(x)])  # 0 + y
        y = (y * 1.0 - 0.0) / 1 + 0.0
        count = torch.arange(8).view(8, 1, 1) / 1  # no longer whole numbers: not nothing
        return self.b(y) * count


def test_what_adds_zero_or_multiplies_by_one_is_no_operation() -> None:
    model, x = _Neutral().eval(), torch.randn(4, 3, 12, 12)
    gm = trace(model, x[:2])
    torch.testing.assert_close(gm(x), model(x))
    b = next(n for n in gm.graph.nodes if is_call(gm, n, nn.Conv2d) and n.target == "b")
    assert is_call(gm, b.args[0], nn.Conv2d)
