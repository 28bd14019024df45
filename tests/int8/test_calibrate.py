from __future__ import annotations

import copy
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter.errors import QuantizeError
from rewriter.graph.axes import channel_axes
from rewriter.graph.interpret import walk
from rewriter.graph.lookup import find, layers, module_of
from rewriter.int8.annotate import annotate, annotation
from rewriter.int8.calibrate import (
    BINS,
    PERCENTILE,
    Histogram,
    Method,
    ValueStats,
    calibrate,
    input_scale,
    least_error_range,
    value_range,
)
from rewriter.int8.integer_grid import dequantized_weight
from rewriter.int8.scheme import QuantSpec, target
from rewriter.tracing.trace import trace
from tests.int8 import oracle
from tests.networks import SIZE, network, randomise

UINT8, SYMMETRIC = QuantSpec(), QuantSpec(symmetric=True, signed=True)


def histogram(*parts: Tensor) -> Histogram:
    found = Histogram()
    for x in parts:
        found.add(x, float(x.abs().max()))
    return found


def annotated(model: nn.Module, *shape: int, name: str = "onnxruntime"):
    gm = trace(randomise(model), torch.randn(2, *shape))
    annotate(gm, target(name))
    return gm


# --------------------------------------------------------------------------------- histograms


@given(st.lists(st.floats(-3, 6), min_size=1, max_size=5), st.integers(0, 100))
@settings(max_examples=30)
def test_growing_bounds_keep_every_count_near_its_place(exponents: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    parts = [torch.randn(200).clamp(-3, 3) * 10**e for e in exponents]
    found, x = histogram(*parts), torch.cat(parts).double()
    assert found.counts.sum() == len(x)
    assert found.bound >= x.abs().max()
    # the same counts as numpy finds with the final bound, up to values on an edge between two bins
    expected = np.cumsum(np.histogram(x.numpy(), BINS, (-found.bound, found.bound))[0])
    total = np.cumsum(found.counts.numpy())
    assert (total[1:] >= expected[:-1]).all()
    assert (total[:-1] <= expected[1:]).all()


def test_zeros_before_and_after_other_values() -> None:
    x = torch.tensor([-1.0, 2.0])
    found = histogram(torch.zeros(5), x, torch.zeros(3))
    assert found.counts[BINS // 2] == 8
    assert found.counts.sum() == 10
    only = histogram(torch.zeros(4))
    stats = ValueStats(0.0, 0.0, torch.zeros(1), torch.zeros(1), only)
    for method in ("minmax", "percentile", "mse"):
        assert value_range(stats, UINT8, method) == (0.0, 0.0)


def test_doubling_is_exact() -> None:
    """A bound that later values exceed many times: pairs of bins merge, none is lost."""
    small = torch.linspace(-1, 1, 2049)[:-1] + 1 / 2048  # the middle of each bin
    found = Histogram(bound=1.0)
    found.add(small, 1.0)
    found.add(torch.tensor([15.0]), 15.0)
    assert found.bound == 16
    inner = found.counts[BINS // 2 - 64 : BINS // 2 + 64]
    assert (inner == 16).all()
    assert found.counts.sum() == 2049


# ------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize("seed", range(5))
def test_percentile_against_numpy(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(100_000) ** 3
    x[:3] *= 100
    found = histogram(x[:1000], x[1000:])
    low, high = found.quantiles(PERCENTILE)
    width = 2 * found.bound / BINS
    x = x.sort().values  # five of the values are 0.005 %
    assert x[4] - width <= low <= x[5] + width
    assert x[-6] - width <= high <= x[-5] + width
    low, high = found.quantiles(0.9)
    assert low == pytest.approx(np.quantile(x, 0.1), abs=width)
    assert high == pytest.approx(np.quantile(x, 0.9), abs=width)


def spread(kind: str) -> Tensor:
    torch.manual_seed(3)
    x = torch.randn(20_000)
    if kind == "long tail":
        return x**3
    if kind == "rectified":
        return (x - 0.5).clamp_min(0) ** 2
    if kind == "outlier":
        return torch.cat([x, torch.tensor([40.0])])
    if kind == "one sided":
        return -x.abs() - 0.5
    return torch.rand(20_000) * 6


@pytest.mark.parametrize("spec", [UINT8, SYMMETRIC], ids=["affine", "symmetric"])
@pytest.mark.parametrize("kind", ["long tail", "rectified", "outlier", "one sided", "flat"])
def test_least_error_against_brute_force(kind: str, spec: QuantSpec) -> None:
    """The chosen range is about as good, in true squared error, as that of a finer search."""
    x = spread(kind)
    low, high = float(x.min()), float(x.max())

    def error(a: float, b: float) -> float:
        if spec.symmetric:
            scale, zero = max(-a, b) / 127, 0
        else:
            scale, zero = oracle.affine(a, b, 0, 255)
        y = oracle.rounded(x.numpy(), scale, zero, spec.qmin, spec.qmax)
        return float(((x.numpy() - y) ** 2).mean())

    shares = np.linspace(1, 0.2, 30)
    if spec.symmetric:
        candidates = [(low * s, high * s) for s in shares]
    else:
        lows = [low * s for s in shares[::2]] if low < 0 else [low]
        candidates = [(a, high * s) for a in lows for s in (shares if high > 0 else [1.0])]
    best = min(error(*c) for c in candidates)
    chosen = error(*least_error_range(histogram(x[:500], x), low, high, spec))
    assert chosen <= best * 1.1
    assert chosen <= error(low, high) * 1.02  # never worse than the whole range


def test_symmetric_range_shrinks_on_both_sides() -> None:
    bulk, found = spread("flat") - 3, histogram(torch.tensor([-7.5, 8.0]))
    for _ in range(100):
        found.add(bulk, 3.0)
    a, b = least_error_range(found, -7.5, 8.0, SYMMETRIC)
    assert max(-a, b) < 4
    assert b - a > 5.9


# ---------------------------------------------------------------------------------- the graph


def test_ranges_and_channel_ranges_against_all_values_at_once() -> None:
    gm = trace(network(3), torch.randn(2, *SIZE))
    annotate(gm, target("onnxruntime"))
    batches = [torch.randn(3, *SIZE) * s for s in (1.0, 0.1, 2.5)]
    found = calibrate(gm, batches)
    assert found.samples == 9
    with torch.no_grad():
        values = [{n.name: v for n, v in walk(gm, (b,))} for b in batches]
    axes = channel_axes(gm)
    for name, stats in found.stats.items():
        x = torch.cat([v[name] for v in values])
        assert (stats.low, stats.high) == (float(x.min()), float(x.max()))
        axis = axes[next(n for n in gm.graph.nodes if n.name == name)]
        channels = x.movedim(axis, 0).flatten(1)
        torch.testing.assert_close(stats.channel_low, channels.amin(1), rtol=0, atol=0)
        torch.testing.assert_close(stats.channel_high, channels.amax(1), rtol=0, atol=0)
    for node in gm.graph.nodes:
        if annotation(node).output is not None:
            assert annotation(node).range_of in found.values


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("name", ["onnxruntime", "per_tensor", "tensorrt", "tflite"])
def test_every_method_gives_every_range(method: Method, name: str) -> None:
    gm = trace(network(7), torch.randn(2, *SIZE))
    annotate(gm, target(name))
    found = calibrate(gm, [torch.randn(4, *SIZE)], method)
    whole = calibrate(gm, [torch.randn(4, *SIZE)])
    assert found.values.keys() == whole.values.keys()
    for low, high in found.values.values():
        assert np.isfinite([low, high]).all()
        assert low <= high


def test_shared_range_is_the_hull() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x) * self.b(x), self.b(x)], 1))

    gm = annotated(Cat(), *SIZE, name="tflite")
    found = calibrate(gm, [torch.randn(4, *SIZE)])
    notes = {n.name: annotation(n) for n in gm.graph.nodes}
    assert notes["mul"].range_of == notes["b_1"].range_of == notes["cat"].range_of
    low, high = found.values[notes["cat"].range_of]
    parts = [found.stats["mul"], found.stats["b_1"]]
    assert (low, high) == (min(s.low for s in parts), max(s.high for s in parts))
    gm = annotated(Cat(), *SIZE)
    assert len({annotation(find(gm, n)).range_of for n in ("mul", "b_1", "cat")}) == 3


def test_moved_value_without_an_int8_source_has_its_own_range() -> None:
    """A part of a recurrent layer's output is a slice whose source is no tensor."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.rnn(x)
            return self.head(y[:, -1])

    gm = annotated(Net(), 6, 5)
    found = calibrate(gm, [torch.randn(8, 6, 5)])
    (head,) = layers(gm)
    (read,) = annotation(head).reads
    low, high = found.values[annotation(find(gm, read)).range_of]
    assert low < 0 < high
    assert input_scale(gm, head, found.values) == UINT8.params(low, high)[0]


def test_memory_does_not_grow_with_the_number_of_inputs() -> None:
    gm = trace(network(1), torch.randn(2, *SIZE))
    annotate(gm, target("onnxruntime"))

    def peak(batches: int) -> int:
        tracemalloc.start()
        data = (torch.randn(1, *SIZE) for _ in range(batches))
        found = calibrate(gm, data, "mse")
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        for stats in found.stats.values():
            assert stats.histogram is not None
            assert stats.histogram.counts.shape == (BINS,)
            assert stats.channel_low.numel() <= 64
        return size

    peak(1)
    assert peak(40) < peak(2) + 2**15  # what Python itself keeps for reuse comes and goes


# ------------------------------------------------------------------------------------ weights


def test_weight_scales_by_layer_and_target() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2), nn.Flatten(), nn.Linear(1728, 5)
    )
    for name, shapes in (
        ("onnxruntime", [(4,), (6,), ()]),
        ("per_tensor", [(), (), ()]),
        ("tensorrt", [(4,), (6,), (5,)]),
    ):
        gm = annotated(copy.deepcopy(model), *SIZE, name=name)
        found = calibrate(gm, [torch.randn(2, *SIZE)])
        assert [tuple(found.weights[n.name].shape) for n in layers(gm)] == shapes
        for node in layers(gm):
            layer = module_of(gm, node)
            axis = {0: None}.get(
                found.weights[node.name].ndim, 1 if "Transpose" in str(layer) else 0
            )
            spec = annotation(node).weight
            assert spec is not None
            expected = oracle.weight(layer.weight.numpy(), axis)
            got = dequantized_weight(layer.weight, found.weights[node.name], spec, axis)
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_bias_of_a_dead_channel_fits_int32() -> None:
    conv = nn.Conv2d(3, 4, 3)
    gm = annotated(nn.Sequential(conv, nn.ReLU()), *SIZE)
    layer = module_of(gm, layers(gm)[0])
    with torch.no_grad():
        layer.weight[1] = 1e-14
        layer.bias[1] = -3.0
    found = calibrate(gm, [torch.randn(2, *SIZE)])
    (node,) = layers(gm)
    scale, step = found.weights[node.name], input_scale(gm, node, found.values)
    stored = (layer.bias.double() / (scale.double() * step)).round()
    assert stored.abs().max() < 2**31
    assert float(stored[1] * scale[1].double() * step) == pytest.approx(-3.0, rel=1e-6)
    alive = [0, 2, 3]
    assert torch.equal(scale[alive], layer.weight.abs().amax((1, 2, 3))[alive] / 127)


def test_keep_float_layer_has_no_weight_scale() -> None:
    gm = trace(network(2), torch.randn(2, *SIZE))
    layers(gm)[1].meta["keep_float"] = True
    annotate(gm, target("onnxruntime"))
    found = calibrate(gm, [torch.randn(2, *SIZE)])
    assert set(found.weights) == {n.name for i, n in enumerate(layers(gm)) if i != 1}


# ------------------------------------------------------------------------------------- errors


def test_errors() -> None:
    gm = annotated(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), *SIZE)
    with pytest.raises(QuantizeError, match="no input"):
        calibrate(gm, [])
    with pytest.raises(QuantizeError, match="'entropy' is not minmax"):
        calibrate(gm, [torch.randn(1, *SIZE)], "entropy")  # type: ignore[arg-type]
    for bad in (float("nan"), float("inf")):
        x = torch.randn(2, *SIZE)
        x[1, 2, 3, 4] = bad
        with pytest.raises(QuantizeError, match="NaN or infinite"):
            calibrate(gm, [torch.randn(1, *SIZE), x])
