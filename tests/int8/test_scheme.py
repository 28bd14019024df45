from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

from rewriter.errors import QuantizeError
from rewriter.int8.integer_grid import dequantized_weight, fake_quantize, on_axis, quantize_weight
from rewriter.int8.scheme import TARGETS, QuantSpec, channel_axis, target, weight_scale
from tests.int8 import oracle

UINT8, INT8 = QuantSpec(), QuantSpec(signed=True)
SYMMETRIC = QuantSpec(symmetric=True, signed=True)
ends = st.floats(-1e4, 1e4, width=32)


@pytest.mark.parametrize(
    ("spec", "qmin", "qmax"),
    [
        (UINT8, 0, 255),
        (INT8, -128, 127),
        (SYMMETRIC, -127, 127),
        (QuantSpec(bits=16, symmetric=True, signed=True), -32767, 32767),
        (QuantSpec(bits=16), 0, 65535),
    ],
)
def test_limits(spec: QuantSpec, qmin: int, qmax: int) -> None:
    assert (spec.qmin, spec.qmax) == (qmin, qmax)


@given(ends, ends, st.sampled_from([UINT8, INT8]))
@example(0.0, 0.0, UINT8)
@example(-1.0, 1.0, UINT8)
@example(-1e-30, 1e-30, INT8)
@example(0.5, 6.0, UINT8)
@example(-3.0, -1.0, INT8)
@example(-0.2785, 50.0, UINT8)
@example(-50.0, 0.29, INT8)
@example(-0.7, 254.3, UINT8)  # no end is cut by more than half a step
@example(-254.3, 0.7, INT8)
def test_affine_parameters(a: float, b: float, spec: QuantSpec) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero = spec.params(low, high)
    assert isinstance(zero, int)
    assert spec.qmin <= zero <= spec.qmax  # so zero is a value of the grid, exactly
    assert scale > 0
    assert np.float32(scale) == scale
    low, high = min(low, 0.0), max(high, 0.0)
    reach = (spec.qmin - zero) * scale, (spec.qmax - zero) * scale
    slack = 0.5 * scale * (1 + 1e-5)
    assert reach[0] <= low + slack
    assert reach[1] >= high - slack
    assume(high - low > 1e-6)
    expected, where = oracle.affine(low, high, spec.qmin, spec.qmax)
    assert scale == pytest.approx(expected, rel=1e-6)
    assert zero == where or oracle.affine(low, high * (1 + 1e-9), spec.qmin, spec.qmax)[1] == zero
    assert scale <= (high - low) / 255 * 1.005  # hardly coarser than it has to be


@pytest.mark.parametrize("high", [10.0, 20.0, 35.0, 50.0, 70.0, 200.0])
def test_the_small_end_does_not_stretch_the_grid(high: float) -> None:
    """SiLU's range: the minimum is one to a few steps below zero, and must not decide the step."""
    scale, zero = UINT8.params(-0.2785, high)
    assert scale <= (high + 0.2785) / 255 * 1.005
    assert -zero * scale <= -0.2785 + 0.5 * scale


@given(ends, ends)
def test_symmetric_parameters(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero = SYMMETRIC.params(low, high)
    assert zero == 0
    assume(max(-low, high) > 1e-6)
    assert scale == pytest.approx(max(-low, high) / 127, rel=1e-6)


def test_ties_go_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 126.5, 127.5, 1e9, -1e9])
    found = fake_quantize(x, 1.0, 0, INT8)
    assert found.tolist() == [-2, -2, 0, 0, 2, 2, 4, 126, 127, 127, -128]
    q = quantize_weight(x, torch.tensor(1.0), SYMMETRIC)
    assert q.dtype is torch.int8
    assert q.tolist() == [-2, -2, 0, 0, 2, 2, 4, 126, 127, 127, -127]
    assert fake_quantize(x, 0.5, 100, UINT8).tolist()[:3] == [-2.5, -1.5, -0.5]


@given(st.integers(0, 1000), st.sampled_from([UINT8, INT8, SYMMETRIC]))
def test_rounding_of_values_against_numpy(seed: int, spec: QuantSpec) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(300) * rng.uniform(0.01, 30) + rng.uniform(-5, 5)).astype(np.float32)
    low, high = np.quantile(x, [0.02, 0.97])  # some values are cut off
    scale, zero = spec.params(float(low), float(high))
    found = fake_quantize(torch.from_numpy(x), scale, zero, spec).numpy()
    expected = oracle.rounded(x, scale, zero, spec.qmin, spec.qmax)
    # torch multiplies by the inverse of the scale: values on a tie to the last bit may fall to
    # the other side
    place = np.float64(x) / scale
    tie = np.abs(place - np.floor(place) - 0.5) < 1e-4
    np.testing.assert_allclose(found[~tie], expected[~tie], rtol=1e-5, atol=1e-6 * scale)
    assert (np.abs(found - expected) <= scale * 1.01).all()
    outside = (x > (spec.qmax - zero) * scale) | (x < (spec.qmin - zero) * scale)
    assert (np.abs(found - x)[~outside] <= scale * 0.5001 + 1e-6 * np.abs(x)[~outside]).all()


def test_gradient_passes_inside_the_range_only() -> None:
    x = torch.tensor([-300.0, -1.2, 0.0, 1.3, 300.0], requires_grad=True)
    fake_quantize(x, 1.0, 0, INT8).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


LAYERS = [
    (nn.Conv2d(3, 5, (3, 2)), 0),
    (nn.Conv2d(4, 6, 3, groups=2), 0),
    (nn.Conv2d(4, 4, 3, groups=4), 0),
    (nn.Conv1d(3, 5, 3), 0),
    (nn.Linear(7, 5), 0),
    (nn.ConvTranspose2d(3, 5, 3), 1),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), None),
]


@pytest.mark.parametrize(("layer", "axis"), LAYERS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_against_numpy(layer: Any, axis: int | None, per_channel: bool) -> None:
    axis = axis if per_channel else None
    spec = QuantSpec(symmetric=True, signed=True, ch_axis=0 if per_channel else None)
    assert channel_axis(layer, spec) == axis
    torch.manual_seed(0)
    weight = torch.randn_like(layer.weight) * torch.rand(layer.weight.shape).pow(4) * 3
    scale = weight_scale(weight, spec, axis)
    assert scale.dtype is torch.float32
    assert scale.shape == (() if axis is None else (weight.shape[axis],))
    expected = oracle.weight(weight.numpy(), axis)
    found = dequantized_weight(weight, scale, spec, axis)
    torch.testing.assert_close(found.double().numpy(), expected, rtol=1e-6, atol=1e-7)
    stored = quantize_weight(weight, scale, spec, axis)
    assert stored.abs().max() == 127
    again = stored.float() * on_axis(scale, weight, axis)
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-7)
    if axis is not None:
        rest = [d for d in range(weight.ndim) if d != axis]
        assert (stored.abs().amax(rest) == 127).all()  # every channel uses its whole range


def test_dead_channel_stays_zero_and_finite() -> None:
    spec = QuantSpec(symmetric=True, signed=True, ch_axis=0)
    weight = torch.randn(3, 2, 3, 3)
    weight[1] = 0
    scale = weight_scale(weight, spec, 0)
    assert (scale > 0).all()
    found = dequantized_weight(weight, scale, spec, 0)
    assert (found[1] == 0).all()
    assert torch.isfinite(found).all()
    scale, zero = UINT8.params(0.0, 0.0)
    assert (fake_quantize(torch.zeros(4), scale, zero, UINT8) == 0).all()


def test_weight_gradient_is_straight_through() -> None:
    weight = torch.randn(3, 2, requires_grad=True)
    spec = QuantSpec(symmetric=True, signed=True, ch_axis=0)
    dequantized_weight(weight, weight_scale(weight, spec, 0), spec, 0).sum().backward()
    assert (weight.grad == 1).all()


def test_sixteen_bits_are_stored_in_sixteen_bits() -> None:
    spec = QuantSpec(bits=16, symmetric=True, signed=True)
    weight = torch.randn(50)
    stored = quantize_weight(weight, weight_scale(weight, spec), spec)
    assert stored.dtype is torch.int16
    assert stored.abs().max() == 32767


def test_targets_say_what_they_are() -> None:
    assert list(TARGETS) == ["onnxruntime", "openvino", "per_tensor", "tensorrt", "tflite", "qnn"]
    ort = target("onnxruntime")
    assert (ort.activations.signed, ort.activations.symmetric) == (False, False)
    assert ort.weights.ch_axis == 0
    assert ort.linear_weights.ch_axis is None
    assert target("per_tensor").weights.ch_axis is None
    assert target("tensorrt").activations.qmin == -128
    assert target("tflite").shared_at == {"cat", "pool", "resize"}
    assert target("qnn").wide == QuantSpec(bits=16)
    assert all(s.wide is None for name, s in TARGETS.items() if name != "qnn")
    assert nn.SiLU in target("tensorrt").fuses
    assert nn.SiLU not in target("onnxruntime").fuses | target("tflite").fuses


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(QuantizeError, match="'tflight'; did you mean 'tflite'"):
        target("tflight")


# ----------------------------------------------------------------------------- planted faults


@pytest.mark.parametrize("fault", ["zero point", "half up", "keeps -128", "truncates"])
def test_a_wrong_quantizer_differs_from_the_oracle(fault: str) -> None:
    """The oracle tells the usual mistakes apart on the data these tests use."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(300) * 3, np.arange(-135, 135) + 0.5])
    good = oracle.rounded(x, 1.0, 3, -127, 127)
    q = {
        "zero point": np.clip(np.rint(x) + 4, -127, 127),
        "half up": np.clip(np.floor(x + 0.5) + 3, -127, 127),
        "keeps -128": np.clip(np.rint(x) + 3, -128, 127),
        "truncates": np.clip(np.trunc(x) + 3, -127, 127),
    }[fault]
    assert np.abs((q - 3) - good).max() >= 1


class _Reversed(frozenset[Any]):
    """The same set in another order, as another process may have it."""

    def __iter__(self) -> Iterator[Any]:
        return reversed(list(super().__iter__()))


@pytest.mark.parametrize("name", TARGETS)
def test_the_identity_of_a_target_does_not_depend_on_the_order_of_a_set(name: str) -> None:
    scheme = target(name)
    other = replace(scheme, fuses=_Reversed(scheme.fuses), shared_at=_Reversed(scheme.shared_at))
    assert other == scheme
    assert other.identity == scheme.identity
    changes: dict[str, Any] = {"fuses": frozenset([nn.GELU]), "shared_at": frozenset(["add"])}
    changes["wide"] = QuantSpec(bits=12)
    for key, value in changes.items():
        assert replace(scheme, **{key: value}).identity != scheme.identity
