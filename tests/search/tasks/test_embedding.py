from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from search.config.schema import ConfigError
from search.tasks.embedding import MEASURES, Embedding


def at(*degrees: float) -> torch.Tensor:
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], 1)


IDENTITY = torch.tensor([0, 0, 1, 1])
# pairs 10 and 20 degrees apart are same, 75 to 105 are different
APART = at(0, 10, 85, 105)
# same: 40, 40; different: 30, 70, 10, 30
MIXED = at(0, 40, 30, 70)


@pytest.mark.parametrize("measure", MEASURES)
def test_identities_far_apart_are_told_whatever_the_lengths(measure: str) -> None:
    lengths = torch.tensor([1.0, 5.0, 0.1, 3.0])[:, None]
    assert Embedding(measure).score([APART * lengths], IDENTITY) == 1.0


def test_known_angles() -> None:
    # of the 8 couples of a same and a different pair, the same is nearer in 2: 40 against 70
    assert Embedding("auc").score([MIXED], IDENTITY) == pytest.approx(0.25)
    assert Embedding("tar").score([MIXED], IDENTITY) == 0.0
    # nearest of 0: 30; of 40: 30; of 30: 40; of 70: 40
    assert Embedding("retrieval").score([MIXED], IDENTITY) == 0.0
    half = at(0, 10, 25, 180)
    # 0 to 10 and 10 to 0 are right, 25 to 10 and 180 to 25 are not
    assert Embedding("retrieval").score([half], torch.tensor([0, 0, 1, 2])) == 0.5


@pytest.mark.parametrize("measure", MEASURES)
def test_a_sample_is_no_pair_with_its_own_repeat(measure: str) -> None:
    task = Embedding(measure)
    once = task.score([MIXED], IDENTITY)
    twice = task.score([MIXED], IDENTITY, [0, 1, 2, 3, 0, 1, 2, 3])
    assert twice == pytest.approx(once)


@pytest.mark.parametrize("measure", MEASURES)
def test_vectors_that_are_not_finite_are_near_nothing(measure: str) -> None:
    broken = APART.clone()
    broken[0] = float("nan")
    assert 0 <= Embedding(measure).score([broken], IDENTITY) < 1


def test_one_identity_alone_says_nothing() -> None:
    assert np.isnan(Embedding().score([APART], torch.zeros(4)))


def test_intervals_are_as_wide_as_those_of_samples_drawn_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    identity = torch.arange(120) % 6
    centers = torch.randn(6, 8, generator=generator)
    vectors = centers[identity] + 1.5 * torch.randn(120, 8, generator=generator)
    task = Embedding()
    drawn = np.random.default_rng(0).integers(0, 120, (200, 120))
    weights = np.stack([np.bincount(d, minlength=120) for d in drawn]).astype(float)
    found = task.resampled(task.matches([vectors], identity), weights)
    wanted = np.array([task.score([vectors], identity, d) for d in drawn])
    assert found.mean() == pytest.approx(wanted.mean(), abs=0.01)
    assert found.std() == pytest.approx(wanted.std(), rel=0.4)


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (torch.zeros(4), IDENTITY, r"the first output must be \(n, D\): \(4,\)"),
        (APART[:3], IDENTITY, "3 outputs for 4 targets"),
        (APART, ["a", "a", "b", "b"], "targets must be identities"),
    ],
)
def test_what_does_not_fit_is_refused(outputs: torch.Tensor, targets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Embedding().score([outputs], targets)
