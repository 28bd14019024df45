from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from search.config.schema import ConfigError
from search.tasks.regression import MEASURES, Regression

TARGET = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
FOUND = torch.tensor([[1.5, 2.0], [4.0, 11.0]])
BEST = {"mae": 0.0, "rmse": 0.0, "absrel": 0.0, "delta": 1.0, "psnr": 120.0}
# errors 0.5 and 0 of the first sample, 0 and 3 of the second; factors 1.5 and 1.375
KNOWN = {
    "mae": (0.25, 1.5),
    "rmse": (math.sqrt(0.125), math.sqrt(4.5)),
    "absrel": (0.25, 3 / 16),
    "delta": (0.5, 0.5),
    "psnr": (-10 * math.log10(0.125), -10 * math.log10(4.5)),
}
WORST = {"mae": math.inf, "rmse": math.inf, "absrel": math.inf, "delta": 0.5, "psnr": -math.inf}


@pytest.mark.parametrize("measure", MEASURES)
def test_a_perfect_and_a_known_prediction(measure: str) -> None:
    task = Regression(measure)
    assert task.higher_is_better == (measure in ("delta", "psnr"))
    assert task.score([TARGET], TARGET) == pytest.approx(BEST[measure])
    found = task.per_sample([FOUND], TARGET)
    assert found is not None and found.tolist() == pytest.approx(KNOWN[measure])
    assert task.score([FOUND], TARGET, [1, 1]) == pytest.approx(KNOWN[measure][1])


@pytest.mark.parametrize("measure", MEASURES)
def test_entries_of_a_target_that_are_not_finite_do_not_count(measure: str) -> None:
    target = TARGET.clone()
    target[0, 0] = target[1, 1] = float("nan")
    assert Regression(measure).score([FOUND], target) == pytest.approx(BEST[measure])
    target[1] = float("inf")  # says nothing at all: counts as the mean
    assert Regression(measure).score([FOUND], target) == pytest.approx(BEST[measure])


@pytest.mark.parametrize("measure", MEASURES)
def test_a_prediction_that_is_not_finite_is_as_wrong_as_can_be(measure: str) -> None:
    found = TARGET.clone()
    found[1, 0] = float("nan")
    values = Regression(measure).per_sample([found], TARGET)
    assert values is not None and values.tolist() == pytest.approx([BEST[measure], WORST[measure]])


def test_sides_of_1_do_not_matter_and_plain_numbers_are_targets() -> None:
    assert Regression().score([torch.tensor([[1.0], [2.0]])], [1.0, 4.0]) == 1.0


def test_the_loss_is_the_mean_absolute_error_of_what_counts() -> None:
    target = TARGET.clone()
    target[1, 1] = float("nan")
    loss = Regression("psnr").training_loss([FOUND.clone().requires_grad_()], target)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 / 3)


@pytest.mark.parametrize(
    ("found", "target", "message"),
    [
        (torch.zeros(2, 3), TARGET, r"prediction of shape \(3,\) for a target of \(2,\)"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 3, 2), r"shape \(2, 3\) for a target of \(3, 2\)"),
        (torch.zeros(3, 2), TARGET, "3 outputs for 2 targets"),
        (torch.zeros(1, 2), ["warm"], "target 0 must be numbers"),
    ],
)
def test_what_does_not_fit_is_refused(found: torch.Tensor, target: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Regression().score([found], target)
