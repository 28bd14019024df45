"""Learned step sizes: gradients against the definition, and the way back to a deployable network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rewriter import Quantized, profile, quantize, simulate, target, trace
from rewriter.graph.lookup import module_of
from rewriter.int8.annotate import annotation
from rewriter.int8.calibrate import input_scale
from rewriter.int8.qat import learnable, to_grid
from tests.search import small


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["per_tensor", "onnxruntime", "tensorrt"])
def quantized(request: Any, images: Tensor) -> Quantized:
    gm = trace(small.small(spread=8.0), images[:2])
    profile(gm, [images])
    return quantize(gm, target(request.param), [images])


def test_gradients_of_rounding_follow_the_definition() -> None:
    x = torch.linspace(-3, 3, 41).reshape(1, 41).requires_grad_()
    scale = torch.tensor(0.37, requires_grad=True)
    low, high = -2, 5
    (to_grid(x, scale, low, high) * torch.arange(41)).sum().backward()
    whole = np.asarray(x.detach()).ravel() / np.float32(0.37)
    inside = (whole >= low) & (whole <= high)
    assert 5 < inside.sum() < 36
    slope = np.where(inside, np.rint(whole) - whole, np.clip(whole, low, high))
    assert scale.grad is not None
    assert x.grad is not None
    assert float(scale.grad) == pytest.approx(float((slope * np.arange(41)).sum()), rel=1e-4)
    assert np.array_equal(np.asarray(x.grad).ravel(), inside * np.arange(41.0))


def test_each_channel_has_the_gradient_of_its_own_scale() -> None:
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    scales = torch.tensor([0.1, 0.02, 0.5])
    together = scales[:, None].clone().requires_grad_()
    to_grid(w, together, -5, 5).square().sum().backward()
    assert together.grad is not None
    for row, scale, got in zip(w, scales, together.grad, strict=True):
        alone = scale.clone().requires_grad_()
        to_grid(row, alone, -5, 5).square().sum().backward()
        assert alone.grad is not None
        assert float(got) == pytest.approx(float(alone.grad), rel=1e-5)


def test_it_starts_as_the_simulation_and_comes_back_unchanged(
    quantized: Quantized, images: Tensor
) -> None:
    learned = learnable(quantized)
    expected = simulate(quantized)(images)
    assert torch.allclose(learned.gm(images), expected, atol=1e-3 * float(expected.abs().max()))
    back = learned.quantized()
    for node in quantized.gm.graph.nodes:
        if annotation(node).output is not None:
            assert back.value_params(node) == quantized.value_params(node)
    for name, scale in quantized.calibration.weights.items():
        assert torch.equal(back.calibration.weights[name], scale)
    assert torch.equal(simulate(back)(images), expected)


def test_the_gradient_reaches_every_weight_and_step(quantized: Quantized, images: Tensor) -> None:
    learned = learnable(quantized)
    learned.gm(images).square().mean().backward()
    silent = [n for n, p in learned.gm.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert learned.values
    assert set(learned.weights) == set(quantized.calibration.weights)


def test_what_is_trained_is_what_is_deployed(quantized: Quantized, images: Tensor) -> None:
    learned = learnable(quantized)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in learned.gm.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator) * (p.abs().mean() + 0.1)
    inside = learned.gm(images).detach()
    outside = simulate(learned.quantized())(images)
    off = (inside - outside).norm() / outside.norm()
    assert off < 0.02, "the deployed network computes something else than the trained one"
    untouched = simulate(quantized)(images)
    assert (untouched - outside).norm() / outside.norm() > 0.04, "the test moved nothing"


def test_frozen_ranges_stay(quantized: Quantized, images: Tensor) -> None:
    learned = learnable(quantized, ranges=False)
    optimizer = torch.optim.SGD([p for p in learned.gm.parameters() if p.requires_grad], 1e-4)
    for _ in range(3):
        learned.gm(images).square().mean().backward()
        optimizer.step()
    back = learned.quantized()
    assert back.calibration.values == quantized.calibration.values or all(
        back.value_params(n) == quantized.value_params(n)
        for n in quantized.gm.graph.nodes
        if annotation(n).output is not None
    )
    assert all(
        torch.equal(back.calibration.weights[n], s)
        for n, s in quantized.calibration.weights.items()
    )
    changed = [
        n
        for n, t in back.gm.state_dict().items()
        if not torch.equal(t, quantized.gm.state_dict()[n])
    ]
    assert changed


def test_a_trained_weight_scale_leaves_room_for_the_int32_bias(
    quantized: Quantized, images: Tensor
) -> None:
    """A kernel adds the bias as an int32 in steps of input scale times weight scale."""
    learned = learnable(quantized)
    with torch.no_grad():
        for log_step in learned.weights.values():
            log_step -= 40.0  # as far as a training that diverges might take it
    back = learned.quantized()
    seen = 0
    for node in back.gm.graph.nodes:
        layer = module_of(back.gm, node) if node.name in back.calibration.weights else None
        step = None if layer is None else input_scale(back.gm, node, back.calibration.values)
        if layer is not None and layer.bias is not None and step is not None:
            seen += 1
            scale = back.calibration.weights[node.name].double()
            steps = layer.bias.detach().double().abs() / (step * scale)
            assert float(steps.max()) <= 2.0**30 * 1.01
    assert seen == 4
