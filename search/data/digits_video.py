"""The embedded video example: handwritten digits that move, and a question that no single frame can answer.

A sequence begins with one digit and goes on to others; each digit stays for a few frames while it moves over the
picture. The label of a frame is 1 where it shows the digit that the sequence began with, after another one was
shown in between; each later digit is that digit in half of the cases, so what a frame shows says nothing about its label.
The network is a small depthwise one for each frame, trained to tell digits as ``search.data.digits`` trains its own, and
a GRU over its features. Nothing is planted: what it loses in int8 comes from that training, see there. The trained
weights are shipped, with the record of their training in ``shipped``.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from search.data import digits as source
from search.data.digits import InvertedResidual, conv_norm
from search.data.images import Arrays, Data, Inputs

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)  # training takes minutes, which must not pass in silence

SEED = 0  # of the shipped weights
FRAMES = 12
SHIFT = 4  # pixels that a digit moves away from the middle at most
STAY = (2, 4)  # frames that one digit is shown, at least and at most
FEATURES, HIDDEN = 64, 48
SEQUENCES = {"calibration": 48, "evaluation": 300, "training": 600}
EPOCHS, RATE, BATCH = 80, 4e-3, 64


def sequences() -> Data:
    """Inputs (12, 1, 32, 32) and labels (12,); evaluation shows other images than training and calibration."""
    parts = {}
    for i, (name, count) in enumerate(SEQUENCES.items()):
        x, y = _sequences(count, seed=i, evaluation=name == "evaluation")
        parts[name] = Arrays(x, y, Tensor.clone)  # pyright: ignore[reportArgumentType]
    return Data(Inputs(parts["calibration"]), parts["evaluation"], parts["training"])


def network(seed: int = SEED) -> nn.Module:
    """(N, 12, 1, 32, 32) to (N, 12) logits; another seed is trained, as ``search.data.digits.network`` does."""
    net = VideoDigits()
    if seed == SEED:
        return source.shipped(net, "digits_video")
    name = source.recipe(seed, Path(__file__), Path(source.__file__))
    file = source.cache_folder() / f"video-digits-{name}.safetensors"
    if not source.restore(net, file):
        train(net, seed)
        source.store(net, file)
    return net.eval()


class Encoder(nn.Module):
    """One frame (N, 1, 32, 32) to 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(1, 8, 3, 2)
        self.blocks = nn.Sequential(
            InvertedResidual(8, 8, 8, 1),
            InvertedResidual(8, 48, 24, 2),
            InvertedResidual(24, 128, 24, 1),
            InvertedResidual(24, 96, 32, 2),
            InvertedResidual(32, 128, 32, 1),
        )
        self.head = conv_norm(32, FEATURES, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.head(self.blocks(self.stem(x)))).flatten(1)


class VideoDigits(nn.Module):
    """The encoder on each frame, a GRU over its features, a score for each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.rnn = nn.GRU(FEATURES, HIDDEN, batch_first=True)
        self.score = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.score(self.rnn(features)[0]).squeeze(-1)


def train(net: VideoDigits, seed: int = 0, epochs: int = EPOCHS, count: int = 1500) -> None:
    """Edit net: train the encoder to tell digits, then the rest on its features, which are computed once."""
    log.info(
        "video digits: training the encoder, then %d epochs of the GRU, seed %d", epochs, seed
    )
    with source.one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = nn.Sequential(net.encoder, nn.Linear(FEATURES, source.CLASSES))
        source.train(classifier, seed, shift=SHIFT)
        x, y = _sequences(count, seed=99, evaluation=False)
        with torch.no_grad():
            features = torch.cat([net.encoder(part.flatten(0, 1)) for part in x.split(50)])
        train_head(net.rnn, net.score, features.unflatten(0, y.shape), y.float(), epochs)
    net.eval()


def train_head(
    rnn: nn.GRU, score: nn.Linear, features: Tensor, labels: Tensor, epochs: int
) -> None:
    """Edit rnn and score: train them on the features (N, T, F) of frames; draws from torch's global generator."""
    for module in (rnn, score):
        module.reset_parameters()
    parameters = [*rnn.parameters(), *score.parameters()]
    optimizer = torch.optim.Adam(parameters, RATE)
    steps = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels))[: steps * BATCH].split(BATCH):
            scores = score(rnn(features[batch])[0]).squeeze(-1)
            used = labels[batch] >= 0
            wanted = labels[batch][used]
            loss = functional.binary_cross_entropy_with_logits(scores[used], wanted)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()


@lru_cache(maxsize=4)
def _sequences(count: int, seed: int, evaluation: bool) -> tuple[Tensor, Tensor]:
    """Inputs (count, 12, 1, 32, 32) and labels (count, 12)."""
    images, classes = source.images_and_classes(32)
    part = source.parts()[1 if evaluation else 0]
    images, classes = images[part], classes[part].numpy()
    random = np.random.default_rng(seed)
    x = torch.empty(count, FRAMES, *images.shape[1:])
    y = torch.zeros(count, FRAMES, dtype=torch.long)
    for i in range(count):
        shown, labels = questions(random)
        places = _path(random)
        chosen = -1
        for t, digit in enumerate(shown):
            if t == 0 or digit != shown[t - 1]:
                chosen = int(random.choice(np.flatnonzero(classes == digit)))
            x[i, t] = _moved(images[chosen], *places[t])
        y[i] = torch.tensor(labels)
    return x, y


def questions(random: np.random.Generator) -> tuple[list[int], list[int]]:
    """The digit of each frame, and its label: whether it is the first one again."""
    first = int(random.integers(source.CLASSES))
    shown, labels, digit = list[int](), list[int](), first
    while len(shown) < FRAMES:
        stay = int(random.integers(STAY[0], STAY[1] + 1))
        labels += [int(digit == first and bool(shown))] * stay
        shown += [digit] * stay
        others = [d for d in range(source.CLASSES) if d not in (first, digit)]
        # a digit never follows itself, so the first one again only after another
        again = digit != first and random.random() < 2 / 3
        digit = first if again else int(random.choice(others))
    return shown[:FRAMES], labels[:FRAMES]


def _path(random: np.random.Generator) -> list[tuple[int, int]]:
    """Where the digit is in each frame, in pixels from the middle; it bounces off the border."""
    place, step = random.uniform(-SHIFT, SHIFT, 2), random.uniform(-2, 2, 2)
    found: list[tuple[int, int]] = []
    for _ in range(FRAMES):
        place = place + step
        step = np.where(np.abs(place) > SHIFT, -step, step)
        place = np.clip(place, -SHIFT, SHIFT)
        found.append((round(float(place[0])), round(float(place[1]))))
    return found


def _moved(image: Tensor, down: int, right: int) -> Tensor:
    side = image.shape[-1]
    padded = functional.pad(image[None], (SHIFT,) * 4, mode="replicate")[0]
    top, left = SHIFT - down, SHIFT - right
    return padded[:, top : top + side, left : left + side]
