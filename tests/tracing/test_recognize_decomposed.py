"""Expressions that are an activation or a normalization become one module; near misses stay what they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewriter import trace
from rewriter.graph.lookup import is_call, module_of

ROOT2 = math.sqrt(2)
CUBIC = math.sqrt(2 / math.pi)


class Written(nn.Module):
    def __init__(self, function: Callable[[Written, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.function = function
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.linear(x))


def norm(x: Tensor, axis: int = -1, eps: float = 1e-5) -> Tensor:
    centered = x - x.mean(axis, keepdim=True)
    return centered / torch.sqrt((centered**2).mean(axis, keepdim=True) + eps)


def inverse(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, True)
    return centered * torch.rsqrt((centered * centered).mean(-1, True) + 1e-6)


FORMS: list[tuple[str, Callable[[Written, Tensor], Tensor], type[nn.Module]]] = [
    ("erf, half last", lambda m, x: x * (torch.erf(x / ROOT2) + 1) * 0.5, nn.GELU),
    ("erf, half first", lambda m, x: 0.5 * x * (1.0 + torch.erf(x * (1 / ROOT2))), nn.GELU),
    ("tanh", lambda m, x: 0.5 * x * (1 + torch.tanh(CUBIC * (x + 0.044715 * x**3))), nn.GELU),
    ("tanh, product", lambda m, x: x * 0.5 * (torch.tanh((x + x * x * x * 0.044715) * CUBIC) + 1), nn.GELU),
    ("mish", lambda m, x: x * torch.tanh(nn.functional.softplus(x)), nn.Mish),
    ("norm", lambda m, x: norm(x), nn.LayerNorm),
    ("norm, affine", lambda m, x: norm(x) * m.weight + m.bias, nn.LayerNorm),
    ("norm, weight", lambda m, x: m.weight * norm(x), nn.LayerNorm),
    ("norm, rsqrt", lambda m, x: inverse(x) * m.weight + m.bias, nn.LayerNorm),
]  # fmt: skip


@pytest.mark.parametrize(("function", "kind"), [f[1:] for f in FORMS], ids=[f[0] for f in FORMS])
def test_forms(function: Callable[[Written, Tensor], Tensor], kind: type[nn.Module]) -> None:
    model = Written(function).eval()
    gm = trace(model, torch.randn(2, 5, 6))
    assert len([n for n in gm.graph.nodes if is_call(gm, n, kind)]) == 1
    assert {n.op for n in gm.graph.nodes} == {"placeholder", "call_module", "output"}
    x = 3 * torch.randn(7, 5, 6)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)


MISSES: list[tuple[str, Callable[[Written, Tensor], Tensor]]] = [
    ("another root", lambda m, x: x * (torch.erf(x / 2) + 1) * 0.5),
    ("another half", lambda m, x: x * (torch.erf(x / ROOT2) + 1) * 0.6),
    ("another value gated", lambda m, x: (x + 1) * (torch.erf(x / ROOT2) + 1) * 0.5),
    ("another cube", lambda m, x: 0.5 * x * (1 + torch.tanh(CUBIC * (x + 0.05 * x**3)))),
    ("over positions", lambda m, x: norm(x, 1)),
    ("means of two axes", lambda m, x: (x - x.mean(1, True)) / torch.sqrt((x**2).mean(-1, True) + 1e-5)),
]  # fmt: skip


@pytest.mark.parametrize("function", [m[1] for m in MISSES], ids=[m[0] for m in MISSES])
def test_near_misses(function: Callable[[Written, Tensor], Tensor]) -> None:
    model = Written(function).eval()
    gm = trace(model, torch.randn(2, 5, 6))
    assert not [n for n in gm.graph.nodes if is_call(gm, n, nn.GELU, nn.LayerNorm, nn.Mish)]
    x = 3 * torch.randn(7, 5, 6)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_value_that_another_reads_too_keeps_its_weight_apart() -> None:
    def function(m: Written, x: Tensor) -> Tensor:
        y = norm(x)
        return y * m.weight + y

    model = Written(function).eval()
    gm = trace(model, torch.randn(2, 5, 6))
    (node,) = [n for n in gm.graph.nodes if is_call(gm, n, nn.LayerNorm)]
    assert torch.equal(module_of(gm, node).weight, torch.ones(6))
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)


def test_an_activation_that_reads_a_product() -> None:
    def gated(m: Written, x: Tensor) -> Tensor:
        y = x * torch.sigmoid(x.mean(-1, True))
        return y * 0.5 * (1 + torch.erf(y / ROOT2))

    model = Written(gated).eval()
    gm = trace(model, torch.randn(2, 5, 6))
    assert len([n for n in gm.graph.nodes if is_call(gm, n, nn.GELU)]) == 1
    x = 3 * torch.randn(7, 5, 6)
    torch.testing.assert_close(gm(x), model(x))
