"""A SiLU network whose stem has channels of very different ranges: which free remedy repairs it.

    python benchmarks/uneven_stem.py ../shared/assets/cifar10_jpeg.npz

Trains a small depthwise separable network on CIFAR-10. Nothing is changed after training: the
scales of the stem's batch norm start spread over three decades, and training leaves them there,
since the batch norm behind the next depthwise convolution takes every scale out again. All plans
are scored by ONNX Runtime's int8 kernels on test images; top-1, KL divergence to the float
network, and the share of the lost top-1 and of the KL that a plan gives back.
"""

from __future__ import annotations

import argparse
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx, nn
from torch.nn import functional

from rewriter import Plan, find_sites, profile, target, trace
from rewriter.assemble import assemble
from rewriter.damage.fidelity import kl_divergence
from rewriter.graph.lookup import layers
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.session import Session

CALIBRATION = 256
SPREAD = (0.02, 20.0)
REMEDIES = ("refine_ranges", "equalize", "correct_bias", "round_weights")


def images(file: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """(count, 3, 32, 32) in [-2, 2], and their classes."""
    with np.load(file) as found:
        data, offsets, labels = (found[f"{part}_{k}"] for k in ("jpeg", "offset", "label"))
        # the file is sorted by class
        chosen = np.random.default_rng(0).permutation(len(labels))[:count]
        pictures = [
            np.asarray(Image.open(io.BytesIO(data[a:b].tobytes())).convert("RGB"))
            for a, b in zip(offsets[chosen], offsets[chosen + 1], strict=True)
        ]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (x - 0.47) / 0.25, torch.from_numpy(labels[chosen].astype(np.int64))


def conv(i: int, o: int, k: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    layer = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(o), nn.SiLU()]


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks: list[nn.Module] = conv(3, 24, 3, 2)
    for i, o, stride in ((24, 48, 1), (48, 96, 2), (96, 96, 1), (96, 128, 2)):
        blocks += [*conv(i, i, 3, stride, i), *conv(i, o, 1)]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    with torch.no_grad():
        low, high = (np.log(v) for v in SPREAD)
        spread = torch.linspace(low, high, 24).exp()
        norm: Any = net[1]
        norm.weight.copy_(spread[torch.randperm(24)])
    return net


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float = 6e-3) -> None:
    batch = 64
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-4)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            seen = x[index].flip(3) if torch.rand(()) < 0.5 else x[index]
            loss = functional.cross_entropy(net(seen), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


def plans(gm: fx.GraphModule) -> Iterator[tuple[str, str]]:
    """Names and texts of the plans."""
    stem = layers(gm)[0].name
    yield "plain int8", ""
    words: list[str] = []
    for word in REMEDIES:
        site = next(s for s in find_sites(gm) if s.rule == word)
        if site.blocked:
            print(f"{word}: {site.blocked}")
            continue
        words.append(f"{word}@model")
        yield f"+ {word}", " ".join(words)
    for k in (2, 3, 4):
        yield f"split_range_{k} alone", f"split_range_{k}@{stem}"
    if any(s.rule == "keep_int16" for s in find_sites(gm)):
        yield "keep_int16 alone", f"keep_int16@{stem}"
    yield "split_range_3 + all free", " ".join([f"split_range_3@{stem}", *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--training", type=int, default=10_000, help="images")
    parser.add_argument("--evaluation", type=int, default=2000, help="images")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    net = network(given.seed)
    x, y = images(given.data, "train", given.training)
    train(net, x, y, given.epochs)
    calibration = x[:CALIBRATION]
    x, y = images(given.data, "test", given.evaluation)
    gm = trace(net, calibration[:2])
    gm.meta["scheme"] = target(given.target)
    profile(gm, [calibration])
    low, high = layers(gm)[0].meta["channel_range"]
    width = (high - low).sort().values
    print(f"channel ranges of the stem: {width[0]:.3g} to {width[-1]:.3g}")
    with torch.no_grad():
        reference = torch.cat([gm(part) for part in x.split(250)])
    level = float((reference.argmax(1) == y).double().mean())
    print(f"{len(x)} images, ONNX Runtime, target {given.target}; float {level:.2%}")
    print(f"{'plan':28} {'top-1':>7} {'KL':>9} {'top-1 back':>10} {'KL back':>8}")
    plain: tuple[float, float] | None = None
    for name, text in plans(gm):
        made = assemble(gm, Plan.parse(text), target(given.target), [calibration]).quantized
        session = Session(to_onnx(made))
        answers = torch.cat([torch.from_numpy(session.run(part)[0]) for part in x.split(250)])
        top = float((answers.argmax(1) == y).double().mean())
        kl = float(kl_divergence(answers, reference).mean())
        plain = plain or (top, kl)
        lost = level - plain[0]
        back = f"{(top - plain[0]) / lost:10.1%}" if lost > 0 else f"{'':10}"
        print(f"{name:28} {top:7.2%} {kl:9.5f} {back} {1 - kl / plain[1]:8.1%}", flush=True)


if __name__ == "__main__":
    main()
