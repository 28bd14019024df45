from __future__ import annotations

import torch
from torch import nn

from rewriter import profile, quantize, target, trace
from rewriter.influence import weigh
from rewriter.int8.clipping import BINS, best_range, least_damage_ranges
from rewriter.int8.scheme import QuantSpec
from tests.rules import check

SHAPE = (3, 20, 16)


def histogram(x: torch.Tensor, weight: torch.Tensor, low: float, high: float) -> torch.Tensor:
    index = ((x - low) * (BINS / (high - low))).long().clamp(0, BINS - 1)
    return torch.bincount(index, weight, BINS)


def damage(
    x: torch.Tensor, weight: torch.Tensor, low: float, high: float, spec: QuantSpec
) -> float:
    scale, zero = spec.params(low, high)
    q = torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, spec.qmin, spec.qmax)
    return float((weight * (q - x).double().square()).sum())


def test_an_outlier_is_clipped_only_where_it_does_not_matter() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1)).double()
    x[0], spec = 60.0, QuantSpec()
    low = float(x.min())
    for importance, clipped in ((1e-3, True), (1e3, False)):
        weight = torch.ones_like(x)
        weight[0] = importance
        found = best_range(histogram(x, weight, low, 60.0), low, 60.0, spec)
        assert (found[1] < 30.0) is clipped
        assert damage(x, weight, *found, spec) <= 1.02 * damage(x, weight, low, 60.0, spec)


def test_signed_symmetric_values_keep_both_ends() -> None:
    spec = QuantSpec(symmetric=True, signed=True)
    x = torch.linspace(-2, 2, 5000).double()
    low, high = best_range(histogram(x, torch.ones_like(x), -2, 2), -2.0, 2.0, spec)
    assert max(-low, high) > 1.9


def test_ranges_of_a_network_follow_the_influence_of_its_channels() -> None:
    model = check.randomise(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.LeakyReLU(0.1), nn.Conv2d(6, 4, 1))
    )
    with torch.no_grad():
        model[0].weight[0] *= 40
        model[0].bias[0] = -60.0  # rarely above zero, and far when it is
    x = check.inputs(SHAPE, 16).float()
    for weight, clipped in ((1e-6, True), (1.0, False)):
        with torch.no_grad():
            model[2].weight[:, 0] = weight
        gm = trace(model, x[:2])
        profile(gm, [x])
        weigh(gm, [x])
        plain = quantize(gm, target("onnxruntime"), [x])
        refined = least_damage_ranges(plain, [x])
        (name,) = [n for n in plain.calibration.values if n == "_1"]
        (low, high), (new_low, new_high) = (q.calibration.values[name] for q in (plain, refined))
        assert low <= new_low <= 0 < new_high <= high
        assert (new_high - new_low < 0.5 * (high - low)) is clipped
        assert refined.calibration.weights is plain.calibration.weights


def test_values_of_unknown_influence_keep_their_ranges() -> None:
    x = check.inputs(SHAPE, 4).float()
    gm = trace(
        check.randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))), x
    )
    plain = quantize(gm, target("onnxruntime"), [x])
    assert least_damage_ranges(plain, [x]).calibration.values == plain.calibration.values
