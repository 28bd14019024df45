"""The whole chain on random networks: trace, annotate, calibrate, simulate, both ONNX forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rewriter.graph.lookup import layers, outputs
from rewriter.int8.annotate import annotation
from rewriter.int8.scheme import target
from rewriter.int8.simulate import Quantized, quantize, simulate
from rewriter.tracing.trace import trace
from tests.networks import SIZE, network, relative_error

TARGETS = ("onnxruntime", "per_tensor", "tensorrt", "tflite")
# Squared error of the simulation relative to the output's variance. The networks are few layers
# deep and their weights are drawn evenly, so that int8 costs them little; a fault of wiring
# costs far more.
MOST = 0.05


def case(seed: int) -> tuple[fx.GraphModule, Quantized, Tensor]:
    gm = trace(network(seed), torch.randn(2, *SIZE))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, *SIZE, generator=generator)
    return gm, quantize(gm, target(TARGETS[seed % 4]), [x[:5], x[5:]]), x


def noise(expected: Tensor, found: Tensor) -> float:
    error = (found - expected).double().square().mean()
    return float(error / expected.double().var().clamp_min(1e-12))


@pytest.mark.parametrize("first", range(0, 100, 10))
def test_simulation_is_close_to_float(first: int) -> None:
    for seed in range(first, first + 10):
        gm, q, x = case(seed)
        with torch.no_grad():
            expected, found = gm(x), simulate(q)(x)
        assert pytree.tree_structure(expected) == pytree.tree_structure(found)
        for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
            assert a.shape == b.shape, seed
            assert torch.isfinite(b).all(), seed
            assert noise(a, b) < MOST, f"seed {seed}: {noise(a, b)}"
        assert relative_error(expected, found) > 0, seed


def test_a_wrong_zero_point_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound above is no formality: wrong ranges break it in most networks."""
    broken = 0
    for seed in range(10):
        gm, q, x = case(seed)
        for name, (low, high) in q.calibration.values.items():
            q.calibration.values[name] = (low * 0.3, high * 0.3)
        with torch.no_grad():
            pairs = zip(pytree.tree_leaves(gm(x)), pytree.tree_leaves(simulate(q)(x)), strict=True)
            broken += any(noise(a, b) > MOST for a, b in pairs)
    assert broken >= 8


@pytest.mark.parametrize("first", range(0, 30, 10))
def test_float_onnx_is_torch(first: int) -> None:
    from rewriter.int8.onnx.export import float_onnx
    from rewriter.int8.onnx.session import Session

    for seed in range(first, first + 10):
        gm = trace(network(seed), torch.randn(2, *SIZE))
        session = Session(float_onnx(gm), threads=1)
        for batch in (1, 5):
            x = torch.randn(batch, *SIZE)
            with torch.no_grad():
                expected = pytree.tree_leaves(gm(x))
            for a, b in zip(expected, session.run(x), strict=True):
                scale = float(a.abs().max())
                np.testing.assert_allclose(
                    b, a.numpy(), rtol=0, atol=1e-4 * scale, err_msg=str(seed)
                )


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_quantized_onnx_without_optimizations_is_the_simulation(first: int) -> None:
    """Both round the same values; one that falls on a tie may move an output by a few steps."""
    from rewriter.int8.onnx.export import to_onnx
    from rewriter.int8.onnx.session import Session

    for seed in range(first, first + 10):
        gm, q, x = case(seed)
        with torch.no_grad():
            expected = pytree.tree_leaves(simulate(q)(x))
            exact = pytree.tree_leaves(gm(x))
        found = Session(to_onnx(q), threads=1, optimize=False).run(x)
        for node, a, b, c in zip(outputs(gm), expected, found, exact, strict=True):
            difference = np.abs(a.numpy() - b)
            if annotation(node).output is not None:
                step = q.value_params(node)[0]
                assert difference.max() <= 3.01 * step, f"seed {seed}: {node.name}"
                assert (difference > 0.01 * step).mean() < 0.03, f"seed {seed}: {node.name}"
            else:
                assert noise(a, torch.from_numpy(b)) < 0.05 * noise(c, a) + 1e-6, f"seed {seed}"


@pytest.mark.parametrize("first", range(100, 130, 10))
def test_engines_agree_where_some_layers_stay_float(first: int) -> None:
    from rewriter.int8.onnx.export import to_onnx
    from rewriter.int8.onnx.session import Session

    for seed in range(first, first + 10):
        gm = trace(network(seed), torch.randn(2, *SIZE))
        rng = np.random.default_rng(seed)
        for node in layers(gm):
            node.meta["keep_float"] = bool(rng.random() < 0.35)
        x = torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(seed))
        q = quantize(gm, target(TARGETS[seed % 2]), [x])
        with torch.no_grad():
            expected = pytree.tree_leaves(simulate(q)(x))
            exact = pytree.tree_leaves(gm(x))
        found = Session(to_onnx(q), threads=1, optimize=False).run(x)
        for a, b, c in zip(expected, found, exact, strict=True):
            assert noise(a, torch.from_numpy(b)) < 0.1 * noise(c, a) + 1e-6, f"seed {seed}"
