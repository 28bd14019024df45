from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter import profile, quantize, simulate, target, trace
from rewriter.graph.lookup import module_of
from rewriter.int8.scheme import QuantSpec
from rewriter.repair.activation_ranges import (
    BINS,
    _Candidates,
    _choice,
    _ranked,
    candidates,
    least_damage_ranges,
)
from tests.rules import check

SHAPE = (3, 20, 16)


def expected_damages(x: Tensor, g: Tensor, low: float, high: float) -> Tensor:
    """(N, candidates), by the definition, in float64."""
    columns: list[Tensor] = []
    for ends in candidates(low, high):
        scale, zero = QuantSpec().params(*ends)
        q = ((x.double() / scale).round() + zero).clamp(0, 255)
        errors = ((q - zero) * scale - x.double()) * g.double()
        columns.append(errors.flatten(1).sum(1).square())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("shape", [(3, 5, 6, 7), (3, 40), (2, 5, 9), (9, 1, 4, 4)])
@pytest.mark.parametrize("last", [(), ("x",), ("g",), ("x", "g")])
def test_damage_is_the_same_in_any_order_in_memory(
    shape: tuple[int, ...], last: tuple[str, ...]
) -> None:
    x, g = (check.inputs(shape, 1, seed=seed)[0].float() for seed in (1, 2))
    expected = expected_damages(x, g, -1.5, 2.0)
    if len(shape) == 4:
        given = {"x": x, "g": g}
        for name in last:
            given[name] = given[name].contiguous(memory_format=torch.channels_last)
        x, g = given["x"], given["g"]
    found = _Candidates(-1.5, 2.0, QuantSpec()).damages(x, g)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("piece", "negative"), [(999, 0.1), (2**16, 0.0), (2**16, 1.0)])
def test_damage_on_bins_is_that_of_the_numbers_in_them(
    piece: int, negative: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewriter.repair.activation_ranges.PIECE", piece)
    x, g = (check.inputs((16, 48, 44), 24, seed=seed).float() for seed in (1, 2))
    x = torch.where(x < 0, negative * x, x)  # LeakyReLU: many numbers are zero, or nearly
    g = g + 0.05 * x
    low, high = min(0.0, float(x.min())), float(x.max())
    made = _Candidates(low, high, QuantSpec())
    assert x[0].numel() >= BINS
    found, expected = made.damages(x, g).mean(0), expected_damages(x, g, low, high).mean(0)
    torch.testing.assert_close(found, expected, rtol=0.3, atol=0.0)


def test_a_value_that_never_varies_does_no_damage() -> None:
    x = torch.zeros(2, 16, 64, 64)
    assert not _Candidates(0.0, 0.0, QuantSpec()).damages(x, torch.ones_like(x)).any()


def test_candidates_lie_inside_and_the_whole_range_is_the_first() -> None:
    for low, high in ((0.0, 5.0), (-2.0, 5.0), (-3.0, 0.0)):
        found = candidates(low, high)
        assert found[0] == (low, high)
        assert all(low <= a <= 0 <= b <= high for a, b in found)
        assert len(set(found)) == len(found)
    assert (-2.0, 5.0 * 0.5) in candidates(-2.0, 5.0)


def test_only_a_gain_beyond_chance_changes_a_range() -> None:
    table = torch.ones(40, 3).double()
    table[:, 1] = 0.95  # less than it takes
    assert _choice(table) == 0
    table[:, 2] = 0.5
    assert _choice(table) == 2
    noise = torch.randn(40, generator=torch.Generator().manual_seed(2)).double()
    table[:, 2] = 0.85 + 2.0 * (noise - noise.mean())
    assert _choice(table) == 0
    assert _choice(torch.ones(1, 3).double()) == 0


class Outlier(nn.Module):
    """A channel that is far larger than the others; whether the answer hangs on it is a weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.stem, self.act, self.head = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)
        check.randomise(self)
        with torch.no_grad():
            self.stem.weight[0] *= 100
            self.stem.bias[0] = 0.0
            self.head.weight[:, 0] = weight * torch.tensor([1.0, -1, 2, 0.5]).view(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.stem(x)))


@pytest.mark.parametrize(("weight", "clipped"), [(0.0, True), (1.0, False)])
def test_an_outlier_is_cut_off_only_where_the_answer_does_not_hang_on_it(
    weight: float, clipped: bool
) -> None:
    x, other = check.inputs(SHAPE, 48).float(), check.inputs(SHAPE, 16, seed=9).float()
    gm = trace(Outlier(weight), x[:2])
    plain = quantize(gm, target("onnxruntime"), x.split(24))
    refined = least_damage_ranges(plain, x.split(24))
    (low, high), (new_low, new_high) = (q.calibration.values["act"] for q in (plain, refined))
    assert low <= new_low <= 0 < new_high <= high
    assert (new_high < 0.5 * high) is clipped
    assert refined.calibration.weights is plain.calibration.weights
    errors = [float((simulate(q)(other) - gm(other)).square().mean()) for q in (plain, refined)]
    assert errors[1] < errors[0] * (0.6 if clipped else 1.05)


def test_weights_and_gradients_of_the_graph_stay() -> None:
    x = check.inputs(SHAPE, 4).float()
    gm = trace(Outlier(1.0), x)
    plain = quantize(gm, target("tflite"), [x])
    before = module_of(gm, next(n for n in gm.graph.nodes if n.name == "stem")).weight.clone()
    profile(gm, [x])
    assert least_damage_ranges(plain, [x]).gm is gm
    after = module_of(gm, next(n for n in gm.graph.nodes if n.name == "stem")).weight
    assert torch.equal(before, after)
    assert after.grad is None


class Scores(nn.Module):
    """Logits of which a few are very sure; whether the graph ends in them or in a sigmoid."""

    def __init__(self, squash: nn.Module) -> None:
        super().__init__()
        self.stem, self.head, self.squash = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), squash
        check.randomise(self)
        with torch.no_grad():
            self.head.weight *= 8

    def forward(self, x: Tensor) -> Tensor:
        rows = self.head(self.stem(x).relu()).flatten(2).transpose(1, 2)
        return torch.cat([rows[..., :1] * 4, self.squash(rows[..., 1:])], -1)


@pytest.mark.parametrize("squash", [nn.Sigmoid(), nn.Softmax(-1), nn.Identity()])
def test_scores_behind_a_sigmoid_keep_their_order(squash: nn.Module) -> None:
    gm = trace(Scores(squash).eval(), check.inputs(SHAPE, 2).float())
    names = {n.name for n in _ranked(gm)}
    stays = not isinstance(squash, nn.Identity)
    assert ("head" in names) is stays
    assert not names & {"stem", "relu"}  # a layer lies between them and the scores
    x = check.inputs(SHAPE, 48).float()
    plain = quantize(gm, target("onnxruntime"), x.split(24))
    refined = least_damage_ranges(plain, x.split(24))
    if stays:
        assert refined.calibration.values["head"] == plain.calibration.values["head"]
