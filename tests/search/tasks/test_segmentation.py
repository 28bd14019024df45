from __future__ import annotations

import numpy as np
import pytest
import torch

from search.config.schema import ConfigError
from search.tasks.segmentation import IGNORED, Segmentation

TASK = Segmentation()
MASKS = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [0, 2]]])


def scores_of(classes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(classes, 3).permute(0, 3, 1, 2).float()


def test_a_perfect_prediction_is_1() -> None:
    assert TASK.score([scores_of(MASKS)], MASKS) == 1.0
    assert TASK.per_sample([scores_of(MASKS)], MASKS) is None


def test_pixels_of_all_images_are_counted_together() -> None:
    found = MASKS.clone()
    found[0, 1, 1] = 0  # class 0: 5 of 6; class 1: 1 of 2; class 2: 1 of 1
    assert TASK.score([scores_of(found)], MASKS) == pytest.approx((5 / 6 + 1 / 2 + 1) / 3)
    # the first image alone, where class 2 does not occur: class 0: 2 of 3; class 1: 1 of 2
    assert TASK.score([scores_of(found)], MASKS, [0]) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_pixels_that_do_not_count_are_left_out() -> None:
    found = MASKS.clone()
    found[0, 1, 1] = 0
    masks = MASKS.clone()
    masks[0, 1, 1] = IGNORED
    assert TASK.score([scores_of(found)], masks) == 1.0


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.7), (-0.3, 0.1)])
def test_one_channel_is_shares_or_logits_of_a_foreground(low: float, high: float) -> None:
    mask = torch.tensor([[[0, 1], [1, 0]]])
    scores = torch.where(mask == 1, high, low)[:, None]
    assert TASK.score([scores], mask) == 1.0


def test_scores_are_resized_to_the_mask() -> None:
    scores = scores_of(torch.tensor([[[0, 1], [0, 1]]]))
    mask = torch.tensor([[0, 0, 1, 1]] * 4)[None]
    assert TASK.score([scores], mask) == 1.0


def test_resampled_metrics_are_those_of_the_images_that_are_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 3, (6, 5, 4), generator=generator)
    scores = torch.randn(6, 3, 5, 4, generator=generator)
    drawn = np.random.default_rng(0).integers(0, 6, (4, 6))
    weights = np.stack([np.bincount(d, minlength=6) for d in drawn]).astype(float)
    found = TASK.resampled(TASK.matches([scores], masks), weights)
    for value, rows in zip(found, drawn, strict=True):
        assert value == pytest.approx(TASK.score([scores[rows]], masks[rows]))


def test_the_loss_falls_towards_the_masks() -> None:
    near = TASK.training_loss([10 * scores_of(MASKS)], MASKS)
    assert near < 0.01 < TASK.training_loss([-10 * scores_of(MASKS)], MASKS)


@pytest.mark.parametrize(
    ("scores", "masks", "message"),
    [
        (torch.zeros(2, 3), MASKS, r"scores must be \(n, classes, h, w\): \(2, 3\)"),
        (torch.zeros(3, 3, 2, 2), MASKS, "3 outputs for 2 targets"),
        (torch.zeros(2, 3, 2, 2), MASKS.reshape(2, 4), r"a mask must be \(H, W\): \(4,\)"),
        (torch.zeros(2, 2, 2, 2), MASKS, "a mask holds 2; the network has 2 classes"),
        (torch.zeros(2, 3, 2, 2), MASKS - 1, "a mask holds -1"),
        (torch.zeros(1, 3, 2, 2), ["cat"], r"target 0 must be a mask \(H, W\)"),
    ],
)
def test_what_does_not_fit_is_refused(
    scores: torch.Tensor, masks: torch.Tensor, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TASK.score([scores], masks)
