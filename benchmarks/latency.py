"""Milliseconds of files in turns, and predicted against measured time of plans.

    python -m benchmarks.latency write now                        # float and plain int8 files of networks
    python -m benchmarks.latency compare before now               # two such folders, in turns, one thread
    python -m benchmarks.latency predict mcunet yunet lcnet       # 30 random plans: table against clock

Times on one thread are processor time, so that other work on the machine is not counted; files take turns all the same.
``write`` runs in a checkout of an older version too (PYTHONPATH), which is how before and after are compared in one run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rewriter import quantize, target, trace
from rewriter.int8.onnx.export import float_onnx, to_onnx

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(os.environ.get("QUANTFIX_ASSETS") or ROOT.parent / "shared" / "assets")
CALIBRATION = 16
# module of the assets, network, data, arguments of the data
TRAINED: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "mcunet": ("zoo", "mcunet", "imagenet", {"resolution": 176}),
    "lite0": ("zoo", "efficientnet_lite0", "imagenet_lite", {}),
    "mobilenetv2": (
        "zoo",
        "mobilenetv2",
        "imagenet",
        {"resolution": 224, "normalise": "imagenet"},
    ),
    "yolo_fastest": ("zoo", "yolo_fastest", "coco", {}),
    "yunet": ("faces", "yunet", "yunet_data", {}),
    "selfie": ("selfie", "build", "data", {}),
    "ocr_crnn": ("ocr", "crnn", "texts", {}),
    "nanodet": ("nanodet", "build", "data", {}),
}
# of timm, with random weights
LAYOUTS = {
    "resnet50": ("resnet50", 224),
    "mobilenetv3": ("mobilenetv3_large_100", 224),
    "lcnet": ("lcnet_100", 224),
    "efficientnet_b0": ("efficientnet_b0", 224),
}
NETWORKS = (*TRAINED, *LAYOUTS, "silu")
STEPS = 3  # at most, of a random plan
# Rules whose sites are exact or change nothing but int8: no fit is needed to see what their file takes.
RULES = ("split_range_2", "split_range_3", "split_weights_2", "split_channels", "keep_float",
         "merge_separable", "densify_depthwise", "float_tail", "split_head_auto")  # fmt: skip


class Block(nn.Module):
    """Two convolutions with SiLU and a skip connection, as YOLOv8 has them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.b(self.act(self.a(x))))


def silu() -> nn.Module:
    """A network with the layers of YOLOv8n's backbone: SiLU, stride 32, 320 px."""
    layers: list[nn.Module] = []
    before = 3
    for channels, blocks in ((16, 0), (32, 1), (64, 2), (128, 2), (256, 1)):
        layers += [nn.Conv2d(before, channels, 3, 2, 1), nn.SiLU()]
        layers += [Block(channels) for _ in range(blocks)]
        before = channels
    return nn.Sequential(*layers, nn.Conv2d(before, 80, 1))


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network in eval mode and its calibration inputs."""
    torch.manual_seed(0)
    if name in TRAINED:
        module, build, data, args = TRAINED[name]
        sys.path[:0] = [str(ASSETS), str(ASSETS / "wide")]
        found: Any = importlib.import_module(module)
        images = getattr(found, data)(**args).calibration
        x = torch.stack([images[i] for i in range(min(CALIBRATION, len(images)))])
        return getattr(found, build)().eval(), x
    if name == "silu":
        return silu().eval(), torch.randn(4, 3, 320, 320)
    import timm

    layout, size = LAYOUTS[name]
    return timm.create_model(layout, pretrained=False).eval(), torch.randn(4, 3, size, size)


def write(folder: Path, names: list[str]) -> None:
    """Float and plain int8 files, and an input, of each network."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        model, x = network(name)
        gm = trace(model, x[:2])
        int8 = to_onnx(quantize(gm, target("onnxruntime"), x.split(4)))
        (folder / f"{name}.float.onnx").write_bytes(float_onnx(gm).SerializeToString())
        (folder / f"{name}.int8.onnx").write_bytes(int8.SerializeToString())
        np.save(folder / f"{name}.npy", x[:1].numpy())
        print(name, flush=True)


def compare(before: Path, now: Path, names: list[str]) -> None:
    """One row for each network that is in both folders."""
    from search.latency.clock import in_turns

    print("| network | float ms | int8 before | int8 now | before / float | now / float |")
    print("|---|---|---|---|---|---|")
    for name in names:
        files = {
            "float": now / f"{name}.float.onnx",
            "before": before / f"{name}.int8.onnx",
            "now": now / f"{name}.int8.onnx",
        }
        if not all(f.is_file() for f in files.values()):
            continue
        x = torch.from_numpy(np.load(now / f"{name}.npy"))
        ms = in_turns({k: f.read_bytes() for k, f in files.items()}, x, 1)
        ratios = [ms[k] / ms["float"] for k in ("before", "now")]
        row = [*(f"{ms[k]:.2f}" for k in files), *(f"{r:.2f}" for r in ratios)]
        print(f"| {name} | {' | '.join(row)} |", flush=True)


def predict(names: list[str], plans: int, seed: int) -> None:
    """Random plans of each network: the table's time, made before any plan ran whole, against the clock."""
    from rewriter import Plan, RewriteError, Step, find_sites, rewrite
    from rewriter.graph.channel_ranges import profile
    from search.latency.clock import in_turns
    from search.latency.price import price_of
    from search.latency.table import this_machine

    table, scheme, errors = this_machine(), target("onnxruntime"), []
    for name in names:
        model, x = network(name)
        gm = trace(model, x[:2])
        profile(gm, [x[:4]])
        sites = [s for s in find_sites(gm) if not s.blocked and s.rule in RULES]
        draw = random.Random(seed)
        files: dict[str, bytes] = {}
        predicted: dict[str, float] = {}
        for _ in range(20 * plans):
            if len(files) == plans:
                break
            count = min(len(sites), draw.randint(0, STEPS))
            plan = Plan(tuple(Step.at(s) for s in draw.sample(sites, count)))
            if str(plan) in files:
                continue
            try:
                made = rewrite(gm, plan, facts={"scheme": scheme})
                file = to_onnx(quantize(made, scheme, [x[:2]])).SerializeToString()
            except RewriteError:
                continue
            files[str(plan)] = file
            predicted[str(plan)] = price_of(file, x[:1], table).milliseconds
        measured = in_turns(files, x[:1], 1)
        pairs = [(predicted[p], measured[p]) for p in files]
        error = [abs(a - b) / b for a, b in pairs]
        # other work on the machine slows all files alike: one factor for all of them
        busy = statistics.median(b / a for a, b in pairs)
        alike = statistics.median(abs(busy * a - b) / b for a, b in pairs)
        errors += error
        ranks = np.argsort(np.argsort(np.array(pairs), axis=0), axis=0)
        rank = float(np.corrcoef(ranks.T)[0, 1])
        low, high = min(measured.values()), max(measured.values())
        print(
            f"{name}: {len(files)} plans of {low:.2f} to {high:.2f} ms; median error {statistics.median(error):.1%}, "
            f"largest {max(error):.1%}; the clock is {busy:.2f} times the table, beyond that the median error is {alike:.1%}; "
            f"rank correlation {rank:.3f}",
            flush=True,
        )
    print(f"all: median error {statistics.median(errors):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("write", "compare", "predict"))
    parser.add_argument("where", nargs="+", help="folders, or names of networks")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        if args.what == "write":
            write(Path(args.where[0]), args.networks)
        elif args.what == "compare":
            compare(Path(args.where[0]), Path(args.where[1]), args.networks)
        else:
            predict(args.where, args.plans, args.seed)


if __name__ == "__main__":
    main()
