"""The embedded example: handwritten digits and a small depthwise network.

The network loses accuracy in int8 with one weight scale for each layer, and nothing is planted to
make it so. It is trained as the MobileNets and EfficientNets were: RMSprop with momentum, L2 on
convolutions, none on batch norm, ReLU6. Some channels go nearly silent under it; the batch norm
after the following depthwise convolution amplifies what is left of them, so that one channel of a
folded depthwise weight is tens of times larger than the others and sets the scale.
Its trained weights are shipped, because how much a network trained like this loses depends on the
seed and on how the processor rounds; ``shipped/digits.json`` records how they were trained, and
``benchmarks/digits_example.py`` trains them again.
Source: Sandler et al., 2018 (arXiv:1801.04381); Sheng et al., 2018 (arXiv:1803.08607) on the loss.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from rewriter.storage import short
from search.data.images import Arrays, Data, Inputs

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)  # training takes a while, which must not pass in silence

SEED = 1  # of the shipped weights
WEIGHTS = Path(__file__).with_name("shipped")  # shipped, one file for each embedded example
CLASSES = 10
TRAINING = 897  # of 1797 images; the other 900 evaluate
CALIBRATION = 128  # the first of the training images
MEAN = 78336.5 / 261120  # see digits()
STD = 0.376

EPOCHS = 40
BATCH = 64
RATE = 0.018
WEIGHT_DECAY = 4e-5
SHIFT = 2  # pixels
EPS = 1e-3


def digits(side: int = 32) -> Data:
    """Scikit-learn's 1797 handwritten digits, enlarged: inputs (1, side, side), ten classes.

    At 32 pixels an enlarged pixel is a multiple of 1/1024, and 255 steps over [0, 1] would put
    some of them exactly between two steps, where engines round differently for no reason. The
    mean shifts all of them half a multiple away from there.
    Source: Alpaydin and Kaynak, 1998, UCI Optical Recognition of Handwritten Digits (CC BY 4.0).
    """
    x, y = images_and_classes(side)
    pairs = [Arrays(x[part], y[part].tolist(), Tensor.clone) for part in parts()]
    training, evaluation, calibration = pairs
    return Data(Inputs(calibration), evaluation, training)


def network(seed: int = SEED) -> nn.Module:
    """The network for 32 pixels, (N, 1, 32, 32) to (N, 10) logits.

    With any other seed than that of the shipped weights it is trained once, then cached in
    ``$QUANTFIX_CACHE`` or ``~/.cache/quantfix``; a file there is named after everything that the
    weights depend on.
    """
    net = architecture()
    if seed == SEED:
        return shipped(net, "digits")
    file = cache_folder() / f"digits-{recipe(seed, Path(__file__))}.safetensors"
    if not restore(net, file):
        train(net, seed)
        store(net, file)
    return net.eval()


def architecture() -> nn.Module:
    """The network before training; it draws from torch's global generator."""
    return _Digits()


def train(net: nn.Module, seed: int = 0, epochs: int = EPOCHS, shift: int = SHIFT) -> None:
    """Edit net: train it on the digits; one seed and one kind of processor give one result."""
    log.info("training the network of the example: %d epochs, seed %d", epochs, seed)
    x, y = images_and_classes(32)
    x, y = x[parts()[0]], y[parts()[0]]
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initialize(net)
        weights = [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        known = {id(w) for w in weights}
        rest = [p for p in net.parameters() if id(p) not in known]
        groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": rest}]
        optimizer = torch.optim.RMSprop(groups, lr=RATE, alpha=0.9, momentum=0.9, eps=1e-3)
        steps = len(y) // BATCH
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, RATE, total_steps=epochs * steps, pct_start=0.2, cycle_momentum=False
        )
        net.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(y))[: steps * BATCH].split(BATCH):
                loss = functional.cross_entropy(net(shifted(x[batch], shift)), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    net.eval()


class InvertedResidual(nn.Module):
    """Inverted residual: expansion, depthwise, projection; the sum where shapes allow it."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand = conv_norm(inputs, inner, 1) if inner != inputs else None
        self.depthwise = conv_norm(inner, inner, 3, stride, groups=inner)
        self.project = conv_norm(inner, outputs, 1, relu=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y


class _Digits(nn.Module):
    """EfficientNet-Lite in small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(1, 16, 3, 2)
        self.blocks = nn.Sequential(
            InvertedResidual(16, 16, 8, 1),
            InvertedResidual(8, 32, 16, 2),
            InvertedResidual(16, 64, 16, 1),
            InvertedResidual(16, 64, 24, 2),
            InvertedResidual(24, 96, 24, 1),
        )
        self.head = conv_norm(24, 64, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.head(self.blocks(self.stem(x)))).flatten(1))


def conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs, eps=EPS)
    return nn.Sequential(conv, norm, nn.ReLU6()) if relu else nn.Sequential(conv, norm)


def initialize(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            module.reset_parameters()


def shifted(x: Tensor, shift: int) -> Tensor:
    """The batch moved by up to ``shift`` pixels, all images alike."""
    side = x.shape[-1]
    down, right = torch.randint(0, 2 * shift + 1, (2,)).tolist()
    padded = functional.pad(x, (shift,) * 4, mode="replicate")
    return padded[:, :, down : down + side, right : right + side]


@lru_cache(maxsize=2)
def images_and_classes(side: int) -> tuple[Tensor, Tensor]:
    """All inputs (1797, 1, side, side) and classes (1797,), in scikit-learn's order."""
    bunch: Any = load_digits()
    pixels = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    size = (side, side)
    x = functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return (x - MEAN) / STD, torch.from_numpy(bunch.target).long()


def parts() -> tuple[Tensor, Tensor, Tensor]:
    """Indices of training, evaluation and calibration images."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(1797))
    return order[:TRAINING], order[TRAINING:], order[:CALIBRATION]


@contextmanager
def one_thread() -> Generator[None]:
    """Sums in the same order whatever the number of cores; on images this small no slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def shipped(net: nn.Module, name: str) -> nn.Module:
    """Edit net: load the weights that come with this package; returns net, in eval mode."""
    net.load_state_dict(safetensors.torch.load_file(WEIGHTS / f"{name}.safetensors"))
    return net.eval()


def cache_folder() -> Path:
    return Path(os.environ.get("QUANTFIX_CACHE") or Path.home() / ".cache" / "quantfix")


def recipe(seed: int, *sources: Path) -> str:
    """Hash of what the weights depend on: source files, torch and the seed."""
    text = "".join(s.read_text(encoding="utf-8") for s in sources) + torch.__version__ + str(seed)
    return short(text)[:16]


def restore(net: nn.Module, file: Path) -> bool:
    """Edit net: load cached weights; False where there are none, or none that can be read."""
    if not file.is_file():
        return False
    try:
        net.load_state_dict(safetensors.torch.load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        log.warning("digits: %s: cannot be used, training again: %s", file, error)
        return False
    return True


def store(net: nn.Module, file: Path) -> None:
    """Write the weights under another name first: a reader never meets half a file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            part.write(safetensors.torch.save(net.state_dict()))
        Path(part.name).replace(file)
    except OSError as error:
        log.warning("digits: weights not cached: %s", error)
