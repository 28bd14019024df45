"""When an order of layers is sure: planted orders, planted noise, and rules that stop too early."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rewriter.sensitivity.ranking_confidence import (
    rank_correlation,
    reliability,
    sample_weights,
    surely_apart,
    undecided,
)


def planted(layers: int, samples: int, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """True damages and what is seen of them on samples of which some hurt a hundred times as much."""
    g = torch.Generator().manual_seed(seed)
    true = torch.logspace(-4, -1, layers, dtype=torch.float64)
    share = torch.randn(samples, generator=g, dtype=torch.float64).mul(1.5).exp()
    seen = torch.randn(layers, samples, generator=g, dtype=torch.float64).mul(noise).square()
    return true, true[:, None] * share * (seen if noise else 1.0)


def test_layers_in_proportion_keep_their_mean() -> None:
    _, harm = planted(12, 40, noise=0)
    found = (harm * sample_weights(harm)).mean(1)
    assert torch.allclose(found, harm.mean(1), rtol=1e-9)


def test_weights_bring_the_order_nearer_to_the_truth() -> None:
    plain, weighted = [], []
    for seed in range(10):
        true, harm = planted(40, 32, seed)
        plain.append(rank_correlation(harm.mean(1), true))
        weighted.append(rank_correlation((harm * sample_weights(harm)).mean(1), true))
    assert 10 - sum(weighted) < 0.5 * (10 - sum(plain))
    assert all(w > p - 0.01 for w, p in zip(weighted, plain, strict=True))


def test_a_layer_that_hurts_on_few_samples_is_still_seen() -> None:
    _, harm = planted(40, 64, noise=0.5)
    harm[0] = 0
    harm[0, :4] = 64 * harm.mean() / 4 * 10
    found = (harm * sample_weights(harm)).mean(1)
    assert int(found.argmax()) == 0


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_layers_without_a_damage_do_not_spoil_the_weights(bad: float) -> None:
    _, harm = planted(6, 20)
    clean = sample_weights(harm)
    spoilt = torch.cat([harm, torch.full((1, 20), bad, dtype=torch.float64)])
    assert torch.allclose(sample_weights(spoilt), clean)
    assert torch.equal(sample_weights(torch.zeros(3, 5)), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("samples", [16, 64, 256])
def test_reliability_is_the_correlation_with_the_truth(samples: int) -> None:
    said, real = [], []
    for seed in range(12):
        true, harm = planted(40, samples, seed)
        harm = harm * sample_weights(harm)
        said.append(reliability(harm))
        real.append(rank_correlation(harm.mean(1), true))
    assert sum(said) / 12 == pytest.approx(sum(real) / 12, abs=0.02)


def test_pure_noise_is_not_reliable() -> None:
    g = torch.Generator().manual_seed(0)
    assert reliability(torch.rand(40, 64, generator=g, dtype=torch.float64)) < 0.6
    assert reliability(torch.ones(40, 1)) == 0.0
    assert reliability(torch.ones(1, 8)) == 1.0


def test_pairs_tell_apart_what_means_do_not() -> None:
    g = torch.Generator().manual_seed(1)
    share = torch.randn(40, generator=g, dtype=torch.float64).mul(1.5).exp()
    a, b = share, 0.8 * share * (1 + 0.1 * torch.rand(40, generator=g, dtype=torch.float64))
    spread = float(a.std()) / 40**0.5
    assert float(a.mean() - b.mean()) < spread  # far inside either one's own error
    assert surely_apart(a.tolist(), b.tolist(), 2.5)
    assert surely_apart(b.tolist(), a.tolist(), 2.5)


def test_one_image_does_not_decide() -> None:
    a, b = [1.0] * 20, [1.0 + 0.1 * (-1) ** i for i in range(20)]
    a[3] = 1000.0
    assert sum(a) > 10 * sum(b)
    assert not surely_apart(a, b, 2.5)


def test_chance_is_seldom_called_sure() -> None:
    g = torch.Generator().manual_seed(2)
    wrong = 0
    for _ in range(200):
        share = torch.randn(32, generator=g, dtype=torch.float64).mul(1.5).exp()
        a, b = (share * torch.randn(32, generator=g, dtype=torch.float64).square() for _ in "ab")
        wrong += surely_apart(a.tolist(), b.tolist(), 2.5)
    assert wrong <= 8  # 4 %; a rule that stops at once would be wrong 200 times


def test_the_same_damage_needs_no_order_and_one_sample_gives_none() -> None:
    assert surely_apart([1.0, 2.0], [1.0, 2.0], 2.5)
    assert not surely_apart([1.0], [5.0], 2.5)
    assert not surely_apart([math.inf, 1.0, 1.0], [1.0, 1.0, 1.0], 2.5)


def rivals(samples: int = 32) -> dict[str, dict[int, list[float]]]:
    """First clearly; third and fourth in no order; second and last two clear."""
    g = torch.Generator().manual_seed(3)
    share = torch.randn(samples, generator=g, dtype=torch.float64).exp()
    jitter = 1 + 0.5 * torch.randn(samples, generator=g, dtype=torch.float64).clamp(-1.5, 1.5)
    level = {"first": 50.0, "second": 10.0, "third": 3.0, "fifth": 0.5, "sixth": 0.49}
    harm = {n: {0: (v * share).tolist()} for n, v in level.items()}
    harm["fourth"] = {0: (3.0 * share * jitter).tolist()}
    return harm


def test_only_the_places_that_matter_are_raced_for() -> None:
    harm = rivals()
    assert undecided(harm, (3,), 2.5) == {"third", "fourth"}
    assert undecided(harm, (1, 2), 2.5) == set()
    assert undecided(harm, (1, 4), 2.5) == set()  # who of the last two is ahead decides nothing
    assert undecided(harm, (9,), 2.5) == set()


def test_layers_are_compared_on_the_samples_that_both_have() -> None:
    low, high = [1.0, 1.1, 0.9, 1.0] * 4, [2.0, 2.2, 1.8, 2.1] * 4
    # the one that stopped after a block of easy samples would lose by its mean alone
    harm = {"stopped": {0: high}, "on": {0: low, 1: [100 * v for v in low]}}
    assert undecided(harm, (1,), 2.5) == set()
    harm = {"stopped": {0: high}, "on": {1: low}}
    assert undecided(harm, (1,), 2.5) == {"stopped", "on"}  # nothing to compare them by


def test_two_halves_that_agree_somewhat_tell_how_far_the_whole_agrees_with_the_truth() -> None:
    """Spearman's rho of the halves is 1 - 6 * 4 / (4 * 15) = 0.6; by Spearman and Brown, sqrt(1.2 / 1.6)."""
    harm = torch.tensor([[1.0, 2.0], [2.0, 1.0], [3.0, 4.0], [4.0, 3.0]], dtype=torch.float64)
    assert reliability(harm) == pytest.approx((1.2 / 1.6) ** 0.5)
