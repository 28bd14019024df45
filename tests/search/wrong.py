"""A user's own code that is wrong in one way each: networks, data and postprocesses as factories."""

from __future__ import annotations

import sys
from typing import Any

import torch
from small import Small, Splits, Unlabeled, data, small  # beside this file in a test's folder
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Around(nn.Module):
    """The small network with something done to its outputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = small(), kind

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        if self.kind == "raises":
            raise RuntimeError("not today")
        if self.kind == "branches" and y.mean() > 0:
            return y * 2
        if self.kind == "maps":
            return x * y.mean()
        if self.kind == "pooled":
            return y.mean(0, keepdim=True)
        if self.kind == "log":
            return torch.log(y)
        return y[y > 0] if self.kind == "chosen" else y


def network(kind: str) -> Any:
    if kind == "raises":
        raise ValueError("no weights today")
    if kind == "exits":
        sys.exit("bye")
    if kind == "meta":
        with torch.device("meta"):
            return Small()
    made = {"none": None, "class": Small, "state": small().state_dict()}
    if kind in made:
        return made[kind]
    model: Any = small()
    if kind == "half":
        return model.half()
    if kind == "nan":
        model.pw.weight.data[0, 0] = float("nan")
    if kind == "layerless":
        return nn.Sequential(nn.ReLU(), nn.Flatten())
    if kind == "gray":
        model.stem[0] = nn.Conv2d(1, 8, 3, 2, 1)
    if kind == "two":
        model.fc = nn.Linear(12, 2)
    return model


def around(kind: str) -> nn.Module:
    return Around(kind)


def splits(kind: str) -> Any:
    good = data()
    calibration = good.calibration
    x, y = (t.clone() for t in good.evaluation.tensors)
    evaluation: Any = TensorDataset(x, y)
    if kind == "raises":
        return {}["calibration"]
    if kind == "no evaluation":
        return type("Half", (), {"calibration": calibration})()
    if kind == "empty":
        evaluation = Unlabeled(torch.zeros(0, 3, 16, 16))
    if kind == "no calibration":
        calibration = Unlabeled(torch.zeros(0, 3, 16, 16))
    if kind == "bytes":
        calibration = Unlabeled(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    if kind == "numpy":
        calibration = [calibration[i].numpy() for i in range(4)]
    if kind == "iterator":
        calibration = iter([calibration[0]])
    if kind == "mixed":
        calibration = [*(calibration[i] for i in range(5)), "a path"]
    if kind == "nan calibration":
        calibration.x[3, 0, 0, 0] = float("nan")
    if kind == "nan evaluation":
        x[30] = float("inf")
    if kind == "narrow":
        evaluation = TensorDataset(x[..., :8], y)
    if kind == "one narrow":
        evaluation = [
            (a[:, :8] if i == 20 else a, b) for i, (a, b) in enumerate(zip(x, y, strict=True))
        ]
    if kind == "label high":
        y[40] = 77
    if kind == "label negative":
        y[40] = -1
    if kind == "float labels":
        evaluation = TensorDataset(x, y.float())
    if kind == "words":
        evaluation = [(a, "cat") for a in x]
    if kind == "none labels":
        evaluation = [(a, None) for a in x]
    if kind == "one hot":
        evaluation = TensorDataset(x, nn.functional.one_hot(y, 5))
    if kind == "overlap":
        calibration = Unlabeled(x[:10])
    return Splits(calibration, evaluation)


def boxes() -> Splits:
    good = data()
    target = {"boxes": torch.tensor([[1.0, 2.0, 9.0, 9.0]]), "labels": torch.tensor([0])}
    return Splits(good.calibration, [(x, target) for x in good.evaluation.tensors[0]])


class Decode:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, outputs: Tensor) -> Any:
        if self.kind == "raises":
            raise ValueError("in the postprocess")
        n = len(outputs)
        if self.kind == "numbers":
            return list(range(n))
        if self.kind == "short":
            return []
        box = torch.zeros(2, 4)
        one = {"boxes": box, "scores": torch.zeros(3), "labels": torch.zeros(2, dtype=torch.int64)}
        if self.kind == "no scores":
            del one["scores"]
        return [one] * n
