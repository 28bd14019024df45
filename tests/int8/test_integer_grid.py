"""The arithmetic of the integer grid against plain numpy, and that it stands in one file."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from rewriter.int8.integer_grid import (
    LARGEST_BIAS,
    PIECE,
    bias_steps,
    dequantized_weight,
    ends,
    fake_quantize,
    least_weight_scale,
    on_grid,
    quantize_weight,
    round_to_int8,
    rounded_bias,
)
from rewriter.int8.scheme import QuantSpec

ROOT = Path(__file__).resolve().parents[2] / "rewriter"
# what rounds whole numbers of something else than a stored tensor, or runs in numpy for speed
ELSEWHERE = {
    "int8/integer_grid.py",
    "int8/fixed_point.py",  # the mean of a kernel in fixed point
    "int8/litert/activations.py",  # integers of a file, in numpy
    "int8/litert/session.py",  # inputs of a file, in numpy
    "int8/simulate.py",  # a kernel's requantization and the fused additions of QLinearAdd
    "repair/weight_rounding.py",
    "repair/activation_ranges.py",
    "sensitivity/inner_products.py",
    "onnx_import/arithmetic.py",
}


def rand(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 16, 9), (3, PIECE // 2)])
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(symmetric=True, signed=True)])
def test_values_are_rounded_as_numpy_rounds_them(shape: tuple[int, ...], spec: QuantSpec) -> None:
    x = rand(*shape)
    scale, zero = spec.params(-2.0, 3.0)
    q = np.rint(x.numpy() / np.float32(scale))
    expected = np.clip(q, spec.qmin - zero, spec.qmax - zero) * np.float32(scale)
    before = x.clone()
    for found in (
        fake_quantize(x, scale, zero, spec),
        round_to_int8(x, scale, zero, spec),
        on_grid(x, scale, *ends(spec, zero)),
        on_grid(x, torch.tensor(scale), *ends(spec, zero), out=torch.empty_like(x)),
    ):
        assert np.array_equal(found.numpy(), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_weights_are_what_is_stored_times_the_scale(axis: int | None) -> None:
    spec, w = QuantSpec(symmetric=True, signed=True), rand(6, 4, 3, 3)
    scale = torch.tensor(0.01) if axis is None else 0.01 + torch.rand(w.shape[axis]) / 50
    q = quantize_weight(w, scale, spec, axis)
    wide = scale if axis is None else scale.view([-1 if d == axis else 1 for d in range(4)])
    assert q.dtype is torch.int8
    assert torch.equal(dequantized_weight(w, scale, spec, axis), q.float() * wide)


def test_a_weight_scale_at_its_bound_leaves_half_of_the_int32() -> None:
    bias = torch.tensor([3.0, -50.0, 0.0])
    least = least_weight_scale(bias, 0.02, per_channel=True)
    steps = bias_steps(bias, 0.02 * least)
    assert steps[:2].abs().tolist() == pytest.approx([2**30, 2**30], rel=1e-6)
    assert float(steps[:2].abs().max()) < LARGEST_BIAS
    assert least_weight_scale(bias, 0.02, per_channel=False) == least.max()


def test_a_bias_is_a_whole_number_of_steps() -> None:
    bias, step = rand(9), torch.full((9,), 0.013)
    found = rounded_bias(bias, step)
    assert torch.equal(found, (bias_steps(bias, step).float() * step))
    assert float((found - bias).abs().max()) <= 0.0066


def test_rounding_stands_in_one_file() -> None:
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        calls = {
            ast.unparse(n.func)
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call)
        }
        rounds = [c for c in calls if c == "torch.round" or c.endswith((".round_", ".rint"))]
        assert name in ELSEWHERE or not rounds, f"{name}: {rounds}"
        assert name == "int8/integer_grid.py" or "2.0**30" not in path.read_text(), name
