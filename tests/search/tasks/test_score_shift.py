"""Score shift of a detector against constructed detections, whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from search.tasks.score_shift import score_shift


def image(scores: list[float], false: list[float] = []) -> dict[str, Tensor]:  # noqa: B006
    """True boxes side by side with these scores, and false ones elsewhere."""
    count = len(scores) + len(false)
    x = torch.arange(count) * 30.0 + torch.tensor([0.0] * len(scores) + [5000.0] * len(false))
    boxes = torch.stack([x, x * 0, x + 20, x * 0 + 20], 1)
    return {
        "boxes": boxes,
        "scores": torch.tensor([*scores, *false]),
        "labels": torch.zeros(count).long(),
    }


def truth(count: int) -> dict[str, Tensor]:
    found = image([1.0] * count)
    return {k: found[k] for k in ("boxes", "labels")}


def test_a_constant_shift_is_found_and_the_threshold_moves_by_it() -> None:
    scores = [0.9, 0.8, 0.7, 0.6, 0.52, 0.4, 0.3]
    reference = [image(scores, [0.55, 0.2])]
    shifted = [image([s - 0.1 for s in scores], [0.45, 0.1])]
    found = score_shift(reference, shifted, [truth(7)])
    assert found.pairs == 9
    assert found.median == pytest.approx(-0.1, abs=1e-6)
    at = next(p for p in found.points if p.threshold == 0.5)
    assert at.recall == pytest.approx((5 / 7, 4 / 7))
    assert at.precision == pytest.approx((5 / 6, 1.0))
    # the fifth true box has .42 in int8 and the false one before it .45, as in float; nothing lies between .5 and .42
    assert at.restored == pytest.approx(0.42, abs=1e-6)
    assert at.restored_precision == pytest.approx(5 / 6)


def test_without_a_shift_the_threshold_stays() -> None:
    same = [image([0.9, 0.6], [0.3]), image([0.7])]
    found = score_shift(same, same, [truth(2), truth(1)])
    assert (found.median, found.low, found.high, found.lost) == (0.0, 0.0, 0.0, 0)
    for at in found.points:
        assert at.recall is not None and at.recall[0] == at.recall[1]
        assert at.restored == pytest.approx(at.threshold)


def test_without_labels_the_number_of_boxes_is_restored() -> None:
    found = score_shift([image([0.9, 0.8, 0.6])], [image([0.7, 0.6, 0.4])])
    at = next(p for p in found.points if p.threshold == 0.5)
    assert at.boxes == (3.0, 2.0)
    assert at.recall is None
    assert at.restored == pytest.approx(0.4)


def test_boxes_that_int8_lost_are_counted_and_other_labels_are_others() -> None:
    other = image([0.9, 0.8])
    other["labels"] = other["labels"] + 1
    found = score_shift([image([0.9, 0.8])], [other], [truth(2)])
    assert (found.pairs, found.lost) == (0, 2)
    nothing = {k: v[:0] for k, v in image([0.9]).items()}
    assert score_shift([nothing], [nothing], [truth(1)]).points[0].recall == (0.0, 0.0)
