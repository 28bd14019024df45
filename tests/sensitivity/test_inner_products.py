"""Products that are found in a roundabout way are those of the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter.graph.ops import clip_bounds
from rewriter.int8.integer_grid import round_to_int8
from rewriter.int8.scheme import target
from rewriter.sensitivity import inner_products as products
from rewriter.sensitivity.inner_products import (
    clipped,
    dot,
    rounding_dot,
    weight_dot,
)
from rewriter.sensitivity.shared_prefix import with_weight


def value(*shape: int, seed: int = 0, last: bool = False) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last) if last else x


def plain(a: Tensor, b: Tensor, samples: int) -> Tensor:
    return (a.double() * b.double()).reshape(samples, -1).sum(1)


@pytest.mark.parametrize(("a_last", "b_last"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_dot_in_any_memory_order(a_last: int, b_last: int) -> None:
    a, b = value(4, 6, 5, 3, last=bool(a_last)), value(4, 6, 5, 3, seed=1, last=bool(b_last))
    assert torch.allclose(dot(a, b, 4), plain(a, b, 4), atol=1e-4)
    assert torch.allclose(dot(a, b, 2), plain(a, b, 2), atol=1e-4)


@pytest.mark.parametrize("piece", [7, 60, 200, 1 << 17])
@pytest.mark.parametrize("last", [False, True])
def test_rounding_dot_in_pieces(monkeypatch: pytest.MonkeyPatch, piece: int, last: bool) -> None:
    monkeypatch.setattr(products, "PIECE", piece)
    spec = target("onnxruntime").activations
    x, g = value(4, 6, 5, 3, last=last), value(4, 6, 5, 3, seed=1)
    for scale, zero in ((0.25, 3), (0.01, 0)):  # the second one saturates
        error = round_to_int8(x, scale, zero, spec) - x
        found = rounding_dot(g, x, (scale, zero, spec), 4)
        assert torch.allclose(found, plain(g, error, 4), atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 7, 1),
        nn.Conv2d(3, 7, 1, stride=2),
        nn.Conv2d(3, 7, 1, padding=1),
        nn.Conv2d(3, 7, 3, padding=1),
        nn.Conv2d(3, 6, 1, groups=3),
        nn.Linear(5, 4),
    ],
)
@pytest.mark.parametrize("samples", [2, 4])
def test_weight_dot_of_any_layer(layer: nn.Module, bias: bool, samples: int) -> None:
    x = value(4, 3, 6, 5, last=True)
    weight = value(*layer.weight.shape, seed=2)  # type: ignore[arg-type]
    change = value(len(weight), seed=3) if bias else None
    with torch.no_grad():
        error = with_weight(layer, weight, change)(x)
    g = value(*error.shape, seed=4)
    found = weight_dot(g, x, layer, weight, change, samples)
    assert torch.allclose(found, plain(g, error, samples), atol=1e-3)


def test_a_sum_over_places_is_taken_where_it_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: (calls.append(1), bmm(a, b))[1])
    for places in (2, 8):
        layer = nn.Conv2d(32, 4, 1)
        x = value(2, 32, places, places)
        weight = value(*layer.weight.shape, seed=2)
        weight_dot(value(2, 4, places, places), x, layer, weight, None, 2)
    assert len(calls) == 1


@pytest.mark.parametrize("module", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7)])
def test_clipping_in_place_has_the_gradient_of_the_module(module: nn.Module) -> None:
    x, g = 3 * value(4, 6, 5, 3), value(4, 6, 5, 3, seed=1)
    found: list[Tensor] = []
    for run in (module, lambda z: clipped(z, *(clip_bounds(module) or (0, 0)))):
        leaf = x.clone().requires_grad_()
        seen: list[Tensor] = []
        z = leaf * 1.0
        z.register_hook(seen.append)
        y = run(z)
        y.backward(g)
        assert leaf.grad is not None
        found += [y.detach(), leaf.grad, seen[0]]
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True))
    assert clip_bounds(nn.SiLU()) is None
