from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rewriter.repair.weight_rounding import (
    MomentSums,
    best_scale,
    reproducing,
    round_weights,
)


def correlated(places: int, weights: int, seed: int = 0) -> Tensor:
    """(1, K, P) columns that move together, as neighbouring pixels do."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, 1, places, generator=generator)
    return common + 0.3 * torch.randn(1, weights, places, generator=generator)


def moments_of(exact: Tensor, rounded: Tensor) -> MomentSums:
    sums = MomentSums()
    for x, y in zip(exact.split(100, 2), rounded.split(100, 2), strict=True):
        sums.add(x, y)
    return sums


def error(q: Tensor, w: Tensor, h: Tensor) -> Tensor:
    return torch.einsum("gok,gkl,gol->go", q - w, h, q - w)


@pytest.mark.parametrize("seed", range(5))
def test_close_to_the_best_of_all_integer_weights(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(1, 3, 5, generator=generator).double() * 2
    x = correlated(200, 5, seed).double()
    h = x @ x.transpose(1, 2) / 200
    q = round_weights(w, torch.ones(1, 3, 1), h, -127, 127)
    assert torch.equal(q, q.round())
    around = torch.tensor(list(itertools.product((-1, 0, 1, 2), repeat=5))).double()
    for o in range(3):
        tried = (w[0, o].floor() + around).unsqueeze(0)
        best = error(tried, w[:, o : o + 1].expand_as(tried), h).min()
        found = error(q[:, o : o + 1], w[:, o : o + 1], h).item()
        nearest = error(w[:, o : o + 1].round(), w[:, o : o + 1], h).item()
        assert found <= nearest + 1e-9
        assert found <= 1.7 * float(best) + 0.02


def test_far_better_than_nearest_on_correlated_inputs_and_never_outside_the_range() -> None:
    w = 2 * torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(1)).double()
    x = torch.cat([correlated(500, 40, 2), correlated(500, 40, 3)]).double()
    h = x @ x.transpose(1, 2) / 500
    q = round_weights(w, torch.ones(2, 16, 1), h, -3, 3)
    nearest = w.round().clamp(-3, 3)
    assert float(q.abs().max()) <= 3
    assert float(error(q, w, h).sum()) < 0.3 * float(error(nearest, w, h).sum())


def test_groups_do_not_mix() -> None:
    w = 3 * torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(1)).double()
    x = torch.cat([correlated(300, 9, s) * (s + 1) for s in range(3)]).double()
    h = x @ x.transpose(1, 2) / 300
    together = round_weights(w, torch.ones(3, 2, 1), h, -127, 127)
    for g in range(3):
        alone = round_weights(w[g : g + 1], torch.ones(1, 2, 1), h[g : g + 1], -127, 127)
        assert torch.equal(together[g : g + 1], alone)


def test_moments_are_the_covariances_whatever_the_mean() -> None:
    x = correlated(350, 4).double() + 1000.0
    y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()
    found = moments_of(x, y).moments()
    both = torch.cov(torch.cat([x[0], y[0]]), correction=0)
    torch.testing.assert_close(found.hessian[0], both[4:, 4:], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.cross[0], both[:4, 4:], rtol=1e-6, atol=1e-9)
    assert found.places == 350


def halves_of(exact: Tensor, rounded: Tensor) -> MomentSums:
    sums = MomentSums()
    for half, (x, y) in enumerate(zip(exact.chunk(2, 2), rounded.chunk(2, 2), strict=True)):
        sums.add(x, y, half)
    return sums


def test_halves_add_up_to_the_whole() -> None:
    x = correlated(300, 4)
    y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    sums, whole = halves_of(x, y), moments_of(x, y).moments()
    assert [h.places for h in sums.halves()] == [150, 150]
    torch.testing.assert_close(sums.moments().hessian, whole.hessian, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums.moments().cross, whole.cross, rtol=1e-5, atol=1e-6)
    assert moments_of(x, y).halves() == []


def test_reproducing_weights_undo_a_distortion_of_the_inputs() -> None:
    """If int8 halves one input, the weight on it must double."""
    w = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(2)).double()
    x = torch.randn(1, 6, 4000, generator=torch.Generator().manual_seed(3)).double()
    y = x.clone()
    y[:, 2] *= 0.5
    found = reproducing(w, halves_of(x, y))
    expected = w.clone()
    expected[..., 2] *= 2
    # the ridge holds back a little
    torch.testing.assert_close(found, expected, rtol=0.06, atol=0.06)


def test_chance_in_the_inputs_leaves_the_weights_alone() -> None:
    """Noise that has nothing to do with the inputs: what a fit to it gains there, other inputs lose."""
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(1, 8, 60, generator=generator).double()
    x = torch.randn(1, 60, 160, generator=generator).double()
    noise = 0.05 * torch.randn(x.shape, generator=generator).double()
    found = reproducing(w, halves_of(x, x + noise))
    other = torch.randn(1, 60, 5000, generator=generator).double()
    there = other + 0.05 * torch.randn(other.shape, generator=generator).double()

    def lost(weights: Tensor) -> float:
        return float((weights @ there - w @ other).square().sum())

    assert lost(found) <= 1.002 * lost(w)
    # nor is anything fitted where there are fewer positions than weights
    few = halves_of(x[..., :90], 0.5 * x[..., :90])
    assert torch.equal(reproducing(w, few), w)


def test_a_clipped_scale_wins_where_an_outlier_does_not_matter() -> None:
    w = torch.rand(1, 1, 32, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    w[..., 0] = 1.6
    h = torch.eye(32).double().unsqueeze(0)
    h[0, 0, 0] = 1e-9
    largest = w.abs().amax(2, keepdim=True) / 7
    assert float(best_scale(w, largest, h, -7, 7, shared=False)) < 0.75 * float(largest)
    h[0, 0, 0] = 1e4
    assert float(best_scale(w, largest, h, -7, 7, shared=False)) > 0.99 * float(largest)


def test_one_scale_is_chosen_for_all_where_it_is_shared() -> None:
    w = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(1)).double()
    h = torch.eye(9).double().expand(2, 9, 9)
    largest = (w.abs().amax() / 7).expand(2, 3, 1)
    found = best_scale(w, largest, h, -7, 7, shared=True)
    assert len(found.unique()) == 1
