"""The embedded detection example: scenes of real digits, and a small detector.

A scene is a dim, noisy picture with a few of scikit-learn's handwritten digits pasted at random
sizes and places. The detector is built as small YOLOs are: a depthwise body and one head
convolution, whose channels hold the distances to the sides of the box in pixels, the objectness
and the classes. The graph decodes them and ends in one tensor with boxes in pixels beside
probabilities, as exporters ship detectors. Nothing is planted: what int8 breaks here, it breaks
because one range for pixels and probabilities leaves the probabilities two or three levels. Its
trained weights are shipped, with the record of their training in ``shipped``.
Source: the distances to the sides, Tian et al., 2019 (arXiv:1904.01355).
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms, generalized_box_iou_loss

from search.data.digits import (
    CALIBRATION,
    CLASSES,
    MEAN,
    STD,
    cache_folder,
    images_and_classes,
    one_thread,
    parts,
    recipe,
    restore,
    shipped,
    store,
)
from search.data.images import Data, Inputs

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)  # training takes a minute, which must not pass in silence

SEED = 0  # of the shipped weights
SIDE = 96
STRIDE = 8
SMALLEST, LARGEST = 18, 52  # sides of a digit in pixels
MAX_DIGITS = 4  # digits in a scene
OVERLAP = 0.1
SCENES = 1500  # for training; CALIBRATION of them calibrate
EVALUATION = 200

EPOCHS = 24
BATCH = 32
RATE = 6e-3

Target = dict[str, Tensor]


class Scenes:
    """(input (1, SIDE, SIDE), {"boxes" (n, 4) xyxy pixels, "labels" (n,)}) pairs."""

    def __init__(self, pixels: Tensor, targets: list[Target]) -> None:
        self.pixels, self.targets = pixels, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if index >= len(self):
            raise IndexError(index)
        return self.pixels[index].clone(), self.targets[index]


def scenes(training: int = SCENES, evaluation: int = EVALUATION, seed: int = 0) -> Data:
    """Scenes; those that evaluate show digits that no other scene shows."""
    known = parts()
    seen = _scenes(known[0], training, seed)
    calibration = Scenes(seen.pixels[:CALIBRATION], seen.targets[:CALIBRATION])
    return Data(Inputs(calibration), _scenes(known[1], evaluation, seed + 1), seen)


def network(seed: int = SEED) -> nn.Module:
    """(N, 1, 96, 96) to (N, 144, 15): xyxy in pixels, objectness and ten classes in [0, 1].

    With another seed it is trained once, then cached, as ``search.data.digits.network`` is.
    """
    net = _Detector()
    if seed == SEED:
        return shipped(net, "digits_detection")
    file = cache_folder() / f"digits-detection-{recipe(seed, Path(__file__))}.safetensors"
    if not restore(net, file):
        train(net, seed)
        store(net, file)
    return net.eval()


def architecture() -> nn.Module:
    """The detector before training; it draws from torch's global generator."""
    return _Detector()


def train(net: _Detector, seed: int = 0, epochs: int = EPOCHS, count: int = SCENES) -> None:
    """Edit net: train it; one seed and one kind of processor give one result."""
    said = "training the detector of the example, about a minute: %d epochs, %d scenes, seed %d"
    log.info(said, epochs, count, seed)
    data = _scenes(parts()[0], count, 0)
    goals = [_goals(t) for t in data.targets]
    boxes, labels = (torch.stack([g[i] for g in goals]) for i in (0, 1))
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.reset_parameters()
        with torch.no_grad():
            assert net.head.bias is not None
            net.head.bias[:4] = (SMALLEST + LARGEST) / 4
            net.head.bias[4:] = -2.0
        optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-3)
        steps = count // BATCH
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, RATE, total_steps=epochs * steps, pct_start=0.2
        )
        net.train()
        for _ in range(epochs):
            for batch in torch.randperm(count)[: steps * BATCH].split(BATCH):
                loss = _loss(net.raw(data.pixels[batch]), boxes[batch], labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    net.eval()


class Decode:
    """Outputs of ``network`` to boxes, scores and labels: threshold and suppression by class."""

    def __init__(self, score: float = 0.01, iou: float = 0.5, top: int = 50) -> None:
        self.score, self.iou, self.top = score, iou, top

    def __call__(self, outputs: Tensor) -> list[Target]:
        found: list[Target] = []
        for rows in outputs:
            scores = rows[:, 4:5] * rows[:, 5:]
            place, label = (scores > self.score).nonzero(as_tuple=True)
            score, box = scores[place, label], rows[place, :4]
            kept = batched_nms(box, score, label, self.iou)[: self.top]
            found.append({"boxes": box[kept], "scores": score[kept], "labels": label[kept]})
        return found


class _Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(1, 16, 3, 2),
            *_separable(16, 32, 2),
            *_separable(32, 64, 2),
            *_separable(64, 64, 1),
            *_separable(64, 64, 1),
        )
        self.head = nn.Conv2d(64, 5 + CLASSES, 1)
        self.register_buffer("centers", _centers().view(1, -1, 2))
        self.centers: Tensor

    def forward(self, x: Tensor) -> Tensor:
        rows = self.raw(x)
        low = self.centers - rows[..., :2]
        high = self.centers + rows[..., 2:4]
        return torch.cat([low, high, rows[..., 4:].sigmoid()], -1)

    def raw(self, x: Tensor) -> Tensor:
        """(N, cells, 15): distances to the sides in pixels, and logits."""
        return self.head(self.body(x)).flatten(2).transpose(1, 2)


def _conv(i: int, o: int, k: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU6())


def _separable(i: int, o: int, stride: int) -> list[nn.Module]:
    return [_conv(i, i, 3, stride, groups=i), _conv(i, o, 1)]


def _centers() -> Tensor:
    """(cells, 2) x and y of the middle of each cell in pixels."""
    at = (torch.arange(SIDE // STRIDE) + 0.5) * STRIDE
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def _goals(target: Target) -> tuple[Tensor, Tensor]:
    """(cells, 4) the box and (cells,) the class that each cell answers for; -1: none.

    A cell answers where its middle is within a stride of that of an object, for the nearest.
    """
    boxes, labels = target["boxes"], target["labels"]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    distance, nearest = (_centers()[:, None] - middle[None]).abs().amax(2).min(1)
    goal = torch.where(distance <= STRIDE, labels[nearest], -1)
    return boxes[nearest], goal


def _loss(found: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """Boxes by generalized IoU, objectness and classes by cross-entropy; ``found``: raw rows."""
    positive = labels >= 0
    objectness = functional.binary_cross_entropy_with_logits(found[..., 4], positive.float())
    rows, wanted = found[positive], functional.one_hot(labels[positive], CLASSES).float()
    classes = functional.binary_cross_entropy_with_logits(rows[:, 5:], wanted)
    middle = _centers().expand(len(found), -1, 2)[positive]
    sides = functional.softplus(rows[:, :4])  # a negative distance is none
    box = torch.cat([middle - sides[:, :2], middle + sides[:, 2:]], 1)
    return 4 * objectness + 4 * classes + generalized_box_iou_loss(box, boxes[positive], "mean")


def _scenes(digits: Tensor, count: int, seed: int) -> Scenes:
    generator = np.random.default_rng(seed)
    x, y = images_and_classes(32)
    x = x * STD + MEAN  # ink in [0, 1]
    made = [_scene(x[digits], y[digits], generator) for _ in range(count)]
    return Scenes(torch.stack([p for p, _ in made]), [t for _, t in made])


def _scene(x: Tensor, y: Tensor, generator: np.random.Generator) -> tuple[Tensor, Target]:
    pixels = torch.from_numpy(generator.normal(0.1, 0.06, (1, SIDE, SIDE))).float()
    boxes: list[list[float]] = []
    labels: list[int] = []
    for _ in range(int(generator.integers(1, MAX_DIGITS + 1))):
        side = int(generator.integers(SMALLEST, LARGEST + 1))
        left, top = (int(v) for v in generator.integers(0, SIDE - side + 1, 2))
        box = [left, top, left + side, top + side]
        if any(_overlap(box, other) > OVERLAP for other in boxes):
            continue
        which = int(generator.integers(len(x)))
        ink = functional.interpolate(
            x[which : which + 1], size=(side, side), mode="bilinear", align_corners=False
        )[0]
        area = pixels[:, top : top + side, left : left + side]
        area.copy_(torch.maximum(area, ink * float(generator.uniform(0.6, 1.0))))
        boxes.append([float(v) for v in box])
        labels.append(int(y[which]))
    target = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}
    return (pixels.clamp(0, 1) - MEAN) / STD, target


def _overlap(a: list[float] | list[int], b: list[float]) -> float:
    """Shared area over the smaller of both."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return max(width, 0) * max(height, 0) / min(areas)
