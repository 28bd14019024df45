"""AP against faster-coco-eval, and what each kind of fault does to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from search.tasks.average_precision import average_precision, match
from search.tasks.detection import Detection, coco_ap
from tests.damage.given import fidelity


def scenes(seed: int, images: int = 12, classes: int = 4):
    """Random objects, and detections that are noisy copies of them and false alarms."""
    g = np.random.default_rng(seed)
    targets, detections = [], []
    for _ in range(images):
        n = int(g.integers(0, 6))
        low = g.uniform(0, 200, (n, 2))
        boxes = np.concatenate([low, low + g.uniform(8, 90, (n, 2))], 1)
        labels = g.integers(0, classes, n)
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)})
        copies = np.repeat(boxes, 2, 0) + g.normal(0, 4, (2 * n, 4))
        low = g.uniform(0, 200, (5, 2))
        alarms = np.concatenate([low, low + g.uniform(8, 90, (5, 2))], 1)
        detections.append(
            {
                "boxes": torch.tensor(np.concatenate([copies, alarms])).float(),
                "labels": torch.tensor(
                    np.concatenate([np.repeat(labels, 2), g.integers(0, classes, 5)])
                ),
                "scores": torch.tensor(g.permutation(2 * n + 5) / (2 * n + 6)).float(),
            }
        )
    return detections, targets


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_reference_implementation(seed):
    detections, targets = scenes(seed)
    ap, ap50 = average_precision(match(detections, targets), np.ones((1, len(targets))))
    expected = coco_ap(detections, targets)
    assert 0.05 < expected[0] < 0.95
    np.testing.assert_allclose((ap[0], ap50[0]), expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_resample_is_the_average_precision_of_its_images(seed):
    detections, targets = scenes(seed)
    chosen = [0, 3, 4, 7, 8]
    weights = np.zeros((1, len(targets)))
    weights[0, chosen] = 1
    expected = coco_ap([detections[i] for i in chosen], [targets[i] for i in chosen])
    ap, ap50 = average_precision(match(detections, targets), weights)
    np.testing.assert_allclose((ap[0], ap50[0]), expected, atol=1e-6)


def test_crowds_neither_count_nor_hurt():
    box = torch.tensor([[0.0, 0, 50, 50], [60, 60, 100, 100]])
    target = {
        "boxes": box,
        "labels": torch.tensor([0, 0]),
        "crowd": torch.tensor([False, True]),
    }
    inside_crowd = torch.tensor([[0.0, 0, 50, 50], [62, 62, 80, 80], [70, 70, 90, 90]])
    found = {
        "boxes": inside_crowd,
        "labels": torch.zeros(3).long(),
        "scores": torch.tensor([0.9, 0.95, 0.99]),
    }
    ap, _ = average_precision(match([found], [target]), np.ones((1, 1)))
    assert ap[0] == pytest.approx(1.0)
    assert coco_ap([found], [target])[0] == pytest.approx(1.0)


def test_perfect_and_wrong_detections():
    _, targets = scenes(0)
    perfect = [{**t, "scores": torch.ones(len(t["labels"]))} for t in targets]
    wrong = [{**p, "labels": p["labels"] + 1} for p in perfect]
    weights = np.ones((1, len(targets)))
    assert average_precision(match(perfect, targets), weights)[0][0] == pytest.approx(1.0)
    assert average_precision(match(wrong, targets), weights)[0][0] < 0.2


def test_task_postprocesses_in_batches_and_keeps_the_order():
    detections, targets = scenes(1, images=70)
    seen = []

    def postprocess(index):
        seen.append(len(index))
        return [detections[int(i)] for i in index.flatten()]

    task = Detection(postprocess)
    outputs = [torch.arange(70).float().view(70, 1)]
    assert task.score(outputs, targets) == pytest.approx(coco_ap(detections, targets)[0])
    assert len(seen) > 1
    chosen = [5, 6, 7, 30]
    expected = coco_ap([detections[i] for i in chosen], [targets[i] for i in chosen])[0]
    assert task.score(outputs, targets, chosen) == pytest.approx(expected)


def test_damage_counts_scores_as_much_as_boxes():
    g = torch.Generator().manual_seed(0)
    boxes = torch.rand(8, 50, 4, generator=g) * 640
    scores = torch.rand(8, 50, 3, generator=g)
    reference = torch.cat([boxes, scores], 2)
    broken_scores = torch.cat([boxes, scores * 0], 2)
    broken_boxes = torch.cat([boxes * 0, scores], 2)
    judge = fidelity([reference], purpose=Detection(lambda x: x).purpose)
    a = judge.damage([broken_scores], [reference]).mean()
    b = judge.damage([broken_boxes], [reference]).mean()
    assert a == pytest.approx(0.5, abs=0.05)
    assert b == pytest.approx(0.5, abs=0.05)
