from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from search.config.schema import ConfigError
from search.tasks.keypoints import MEASURES, Keypoints, Measure

# a box of 100 by 50, so errors are relative to 100, and the area is 5000
TARGET = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 50.0], [100.0, 50.0]])[None]
OFF = TARGET + torch.tensor([[4.0, 0], [0, 6], [0, 0], [6, 8]])  # distances 4, 6, 0 and 10


@pytest.mark.parametrize(("measure", "best"), [("pck", 1.0), ("nme", 0.0), ("oks", 1.0)])
def test_perfect_points(measure: Measure, best: float) -> None:
    task = Keypoints(measure)
    assert (task.metric, task.higher_is_better) == (measure, measure != "nme")
    for form in (TARGET, TARGET.flatten(1), torch.cat([TARGET, torch.rand(1, 4, 1)], 2)):
        assert task.score([form], TARGET) == pytest.approx(best)


def test_known_distances() -> None:
    assert Keypoints("pck").score([OFF], TARGET) == 0.5  # 4 and 0 are within 5
    assert Keypoints("nme").score([OFF], TARGET) == pytest.approx(0.05)
    wanted = sum(math.exp(-(d**2) / (2 * 5000 * 0.01)) for d in (4, 6, 0, 10)) / 4
    assert Keypoints("oks").score([OFF], TARGET) == pytest.approx(wanted)


def test_points_that_are_not_labelled_do_not_count() -> None:
    seen = torch.tensor([2.0, 0, 1, 1])[None, :, None]
    target = torch.cat([TARGET, seen], 2)
    for form in (target, target.flatten(1)):
        assert Keypoints("nme").score([OFF], form) == pytest.approx(0.14 / 3)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_sample_that_says_nothing_counts_as_the_mean(measure: Measure) -> None:
    task = Keypoints(measure)
    nothing = torch.full((1, 4, 2), float("nan"))
    one = nothing.clone()
    one[0, 0] = 3.0  # a single point spans no box
    alone = task.score([OFF], TARGET)
    for other in (nothing, one):
        found = task.per_sample([OFF.repeat(2, 1, 1)], torch.cat([TARGET, other]))
        assert found is not None and found.tolist() == pytest.approx([alone, alone])


@pytest.mark.parametrize(("measure", "worst"), [("pck", 0.0), ("nme", math.inf), ("oks", 0.0)])
def test_points_that_are_not_finite_are_as_wrong_as_can_be(measure: Measure, worst: float) -> None:
    found = torch.cat([TARGET, torch.full((1, 4, 2), float("nan"))])
    values = Keypoints(measure).per_sample([found], TARGET.repeat(2, 1, 1))
    assert values is not None and values[1] == worst


def test_the_highest_place_of_a_heatmap() -> None:
    maps = torch.zeros(1, 2, 5, 7)
    maps[0, 0, 3, 6] = maps[0, 1, 0, 2] = 1.0
    target = torch.tensor([[[6.0, 3.0], [2.0, 0.0]]])
    assert Keypoints("nme").score([maps], target) == 0.0


@pytest.mark.parametrize(
    ("found", "target", "message"),
    [
        (
            torch.zeros(1, 3),
            TARGET,
            r"must be \(n, 2 K\), \(n, K, 2\) or \(n, K, h, w\): \(1, 3\)",
        ),
        (TARGET, TARGET.repeat(2, 1, 1), "1 outputs for 2 targets"),
        (TARGET, TARGET[:, :3], r"4 points for a target of shape \(3, 2\)"),
        (TARGET, torch.zeros(1, 5), r"4 points for a target of shape \(5,\)"),
        (TARGET, torch.zeros(1), r"4 points for a target of shape \(\)"),
        (TARGET, torch.zeros(1, 4, 2, 2), r"4 points for a target of shape \(4, 2, 2\)"),
        (TARGET, ["left"], "target 0 must be points"),
    ],
)
def test_what_does_not_fit_is_refused(found: torch.Tensor, target: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Keypoints().score([found], target)
