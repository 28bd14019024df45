"""A video network that really suffers in int8: MCUNet's trunk on each frame, and a GRU over its features.

Sequences of 8 frames, composed of ImageNet and COCO photographs; the frames of one photograph pan over it. The first photograph
is the cue; the label of a later frame says whether it shows what the cue shows, an animal or none. No single frame
tells, since half of the cues are animals. The trunk is as published; the GRU is trained on its features, which are
computed once, on photographs that the evaluation does not show. Weights are cached in ``~/.cache/quantfix``.

    python -m benchmarks.video                     # train if need be, and what it reaches
    quantfix table benchmarks/video.yaml           # int8, before and after replacing the first block
"""

from __future__ import annotations

import csv
import importlib.util
import logging
import os
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from search.data import digits
from search.data.digits_video import train_head
from search.data.images import Data, Inputs
from search.tasks.video import Video

FRAMES, SIDE, LARGE = 8, 176, 208
STAY = (1, 2)  # frames of one photograph
ANIMALS = 398  # the first classes of ImageNet
COCO_ANIMALS = frozenset(range(14, 24))
IMAGENET_TRAINING = 300  # of 650
HIDDEN, CROPS, SEQUENCES, EPOCHS = 48, 6, 3000, 30
IGNORED = -1


def assets() -> Path:
    """The folder of trained networks and photographs."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "assets"
    return Path(os.environ.get("QUANTFIX_ASSETS") or beside)


def zoo() -> Any:
    """The factories of the assets."""
    if "zoo" not in sys.modules:
        spec = importlib.util.spec_from_file_location("zoo", assets() / "zoo.py")
        assert spec is not None and spec.loader is not None
        sys.modules["zoo"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["zoo"])
    return sys.modules["zoo"]


class Trunk(nn.Module):
    """One frame (N, 3, 176, 176) to the features that MCUNet's classifier reads."""

    def __init__(self) -> None:
        super().__init__()
        net = zoo().mcunet()
        self.stem, self.blocks, self.mix, self.pool = net.stem, net.blocks, net.mix, net.pool
        self.features = int(net.classifier.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.mix(self.blocks(self.stem(x)))).flatten(1)


class McunetGru(nn.Module):
    """(N, 8, 3, 176, 176) to (N, 8) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.rnn = nn.GRU(self.trunk.features, HIDDEN, batch_first=True)
        self.score = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.score(self.rnn(features)[0]).squeeze(-1)


@lru_cache(maxsize=2)
def photographs(evaluation: bool) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Pixels (n, 208, 208, 3) of all photographs of one side, and whether they show an animal."""
    root = assets()
    with (root / "imagenet_val650" / "labels.csv").open(newline="") as f:
        rows = [(root / "imagenet_val650" / r["file"], int(r["label"])) for r in csv.DictReader(f)]
    rows = rows[IMAGENET_TRAINING:] if evaluation else rows[:IMAGENET_TRAINING]
    found = [(path, label < ANIMALS) for path, label in rows]
    coco = root / "coco128" / ("evaluation" if evaluation else "calibration")
    for path in sorted((coco / "images").glob("*.jpg")):
        text = coco / "labels" / f"{path.stem}.txt"
        lines = text.read_text().splitlines() if text.exists() else []
        found.append((path, any(int(line.split()[0]) in COCO_ANIMALS for line in lines)))
    pixels = np.stack([square_pixels(path) for path, _ in found])
    return pixels, np.array([animal for _, animal in found])


def square_pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        image = image.convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        return np.asarray(image.resize((LARGE, LARGE), Image.Resampling.BILINEAR))


def cropped(pixels: NDArray[np.uint8], left: int, top: int, mirror: bool) -> Tensor:
    """(3, 176, 176) as MCUNet reads it."""
    part = pixels[top : top + SIDE, left : left + SIDE]
    part = part[:, ::-1] if mirror else part
    return torch.from_numpy(part.copy()).permute(2, 0, 1).float().div(127.5).sub(1)


class Sequences:
    """(input (8, 3, 176, 176), labels (8,)) pairs, made when asked for; the same index gives the same sequence."""

    def __init__(self, count: int, seed: int, evaluation: bool) -> None:
        self.count, self.seed, self.evaluation = count, seed, evaluation

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, animal = photographs(self.evaluation)
        random = np.random.default_rng([self.seed, index])
        shown, labels = story(random, animal)
        frames: list[Tensor] = []
        place, step, mirror = np.zeros(2, int), np.zeros(2, int), False
        for t, k in enumerate(shown):
            if t == 0 or k != shown[t - 1]:
                place = random.integers(0, LARGE - SIDE + 1, 2)
                step, mirror = random.integers(-8, 9, 2), bool(random.random() < 0.5)
            place = np.clip(place + step, 0, LARGE - SIDE)
            frames.append(cropped(pixels[k], int(place[0]), int(place[1]), mirror))
        return torch.stack(frames), torch.tensor(labels)


def story(random: np.random.Generator, animal: NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Which photograph each frame shows, and its label: whether it is of the cue's kind; the cue itself has none."""
    shown, labels, cue = list[int](), list[int](), False
    while len(shown) < FRAMES:
        wanted = bool(random.random() < 0.5)
        k = int(random.choice(np.flatnonzero(animal == wanted)))
        stay = int(random.integers(STAY[0], STAY[1] + 1))
        if not shown:
            cue = wanted
            labels += [IGNORED] * stay
        else:
            labels += [int(wanted == cue)] * stay
        shown += [k] * stay
    return shown[:FRAMES], labels[:FRAMES]


def sequences(evaluation: int = 120, calibration: int = 16, training: int = 160) -> Data:
    """Calibration and training show the photographs that the GRU was trained on, evaluation others."""
    return Data(
        Inputs(Sequences(calibration, 1, False)),
        Sequences(evaluation, 0, True),
        Sequences(training, 2, False),
    )


def network(seed: int = 0) -> nn.Module:
    """The trained network; its GRU is trained once, then cached."""
    net = McunetGru().eval()
    file = digits.cache_folder() / f"mcunet-gru-{digits.recipe(seed, Path(__file__))}.safetensors"
    if not digits.restore(net, file):
        train(net, seed)
        digits.store(net, file)
    return net.eval()


def train(net: McunetGru, seed: int) -> None:
    """Edit net: train the GRU and the score on the trunk's features of several crops of each photograph."""
    pixels, animal = photographs(False)
    with digits.one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random = np.random.default_rng(seed)
        features = torch.empty(CROPS, len(pixels), net.trunk.features)
        for crop in range(CROPS):
            places = random.integers(0, LARGE - SIDE + 1, (len(pixels), 2))
            for start in range(0, len(pixels), 20):
                part = range(start, min(start + 20, len(pixels)))
                x = torch.stack(
                    [
                        cropped(pixels[k], int(places[k, 0]), int(places[k, 1]), bool(crop % 2))
                        for k in part
                    ]
                )
                with torch.no_grad():
                    x = x.contiguous(memory_format=torch.channels_last)
                    features[crop, start : start + len(x)] = net.trunk(x)
        rows, labels = [], []
        for _ in range(SEQUENCES):
            shown, label = story(random, animal)
            rows.append(features[random.integers(0, CROPS, FRAMES), shown])
            labels.append(label)
        train_head(net.rnn, net.score, torch.stack(rows), torch.tensor(labels).float(), EPOCHS)


def main() -> None:
    """Say what the float network reaches."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.process_time()
    net = network()
    print(f"network: {time.process_time() - start:.0f} s of CPU time")
    data = sequences().evaluation
    pairs = [data[i] for i in range(len(data))]
    with torch.no_grad():
        scores = torch.cat([net(x[None]) for x, _ in pairs])
    labels = torch.stack([y for _, y in pairs])
    found = Video().score([scores], labels)
    print(f"float AUC {found:.4f}, {len(data)} sequences of {FRAMES} frames, torch float32")


if __name__ == "__main__":
    main()
