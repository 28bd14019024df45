"""Which task a run from Python has: named, or what the metric and the targets say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantfix
from quantfix._inputs import data_of
from quantfix._tasks import name_of, task_of

X = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("targets", "metric", "expected"),
    [
        (None, None, "unlabelled"),
        (torch.zeros(12, dtype=torch.long), None, "classification"),
        (np.zeros(12, np.int32), None, "classification"),
        ([1] * 12, None, "classification"),
        (torch.zeros(12, 4), "ap", "detection"),
        (None, "top1", "classification"),
        (torch.zeros(12, 4), len, "custom"),
    ],
)
def test_an_unnamed_task(targets: Any, metric: Any, expected: str) -> None:
    given = X if targets is None else (X, targets)
    assert name_of(None, metric, data_of(X, given)) == expected


def test_targets_that_no_task_is_known_by_must_have_one_named() -> None:
    data = data_of(X, (X, torch.zeros(12, 16, 16)))
    with pytest.raises(
        quantfix.ConfigError, match=r"task: must be named .*: Tensor; known: class"
    ):
        name_of(None, None, data)
    assert name_of("segmentation", None, data) == "segmentation"


def test_a_measure_is_the_metric_of_its_task() -> None:
    assert task_of("keypoints", None, "nme", True, None).metric == "nme"
    assert task_of("keypoints", {"measure": "pck"}, None, True, None).metric == "pck"
    assert task_of("ocr", {"alphabet": "abc"}, None, True, None).metric == "words"
    with pytest.raises(quantfix.ConfigError, match=r"task_args\.measure: 'top1'"):
        task_of("keypoints", None, "top1", True, None)


class Masks(nn.Module):
    """Two classes for each pixel; one channel of the depthwise layer is 300 times larger, and undone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU())
        self.dw = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)
        with torch.no_grad():
            self.dw[0].weight[3] *= 300
            self.dw[0].bias[3] *= 300
            self.head.weight[:, 3] /= 300
            self.head.weight *= 20

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dw(self.stem(x)))


@pytest.mark.slow
def test_masks_are_fixed_from_python(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Masks().eval()
    with torch.no_grad():
        masks = model(X).argmax(1)
    found = quantfix.fix(
        model, X, (X, masks), max_damage=1e-3, task="segmentation", target="per_tensor",
        trials=8, out=tmp_path / "run", progress=False, device="cpu",
    )  # fmt: skip
    assert found.baseline["damage"] > 1e-3
    assert found.met and found.chosen is not None and found.chosen.damage <= 1e-3
    assert found.chosen.float == 1.0
