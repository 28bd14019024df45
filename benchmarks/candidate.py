"""One candidate evaluation by us and by naive fake quantization in torch, side by side in one run.

    python benchmarks/candidate.py                          MCUNet and mobilenetv2_100, 550 images
    python benchmarks/candidate.py mcunet --images 100 --target per_tensor

Ours: calibrate the traced graph, emit the QDQ file, make a session, run all images on the int8 kernels.
Naive: copy the folded network, put an observer on the input of every layer, calibrate, turn the observers into fake quantization,
run all images; eager, NCHW, batches of 50, as scripts on torch do it. Both start from the same float network, with the same calibration
images and ranges. They take turns, each part of the images on both, so that other work on the machine disturbs both alike; times are CPU
seconds of the process, and seconds on the clock. Compare the ratios.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from sensitivity import Observed, assets  # noqa: E402

from rewriter.graph.lookup import layers  # noqa: E402
from rewriter.int8.onnx.export import to_onnx  # noqa: E402
from rewriter.int8.onnx.session import Session  # noqa: E402
from rewriter.int8.scheme import target  # noqa: E402
from rewriter.int8.simulate import quantize  # noqa: E402
from rewriter.tracing.trace import trace  # noqa: E402

INPUTS: dict[str, tuple[Any, ...]] = {"mcunet": (176, "half"), "mobilenetv2": (224, "imagenet")}
Clock = dict[str, list[float]]


def timed(clock: Clock, part: str, action: Callable[[], Any]) -> Any:
    """Run, and add CPU seconds and seconds on the clock to a part's."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = action()
    clock[part][0] += time.process_time() - cpu
    clock[part][1] += time.perf_counter() - wall
    return result


def prepared(gm: Any, scheme: Any) -> Any:
    """A copy with an observer before every layer."""
    model = copy.deepcopy(gm)
    for node in layers(gm):
        name = str(node.target)
        model.set_submodule(name, Observed(model.get_submodule(name), scheme))
    return model


def observers(model: Any) -> list[Observed]:
    return [m for m in model.modules() if isinstance(m, Observed)]


@torch.no_grad()
def compare(name: str, options: argparse.Namespace) -> None:
    """Print what one candidate of a network costs."""
    import zoo  # type: ignore[import-not-found]

    data = zoo.imagenet(*INPUTS[name])
    calibration = torch.stack([data.calibration[i] for i in range(64)])
    count = min(options.images, len(data.evaluation))
    pairs = [data.evaluation[i] for i in range(count)]
    images, labels = torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])
    gm, scheme = trace(getattr(zoo, name)(), images[:1]), target(options.target)
    ours: Clock = defaultdict(lambda: [0.0, 0.0])
    naive: Clock = defaultdict(lambda: [0.0, 0.0])

    def calibrated_naively() -> Any:
        model = prepared(gm, scheme)
        for x in calibration.split(50):
            model(x)
        for m in observers(model):
            m.convert()
        return model

    quantize(gm, scheme, calibration[:16].split(16))  # warm up
    gm(images[:16])
    quantized = timed(
        ours, "calibrate", lambda: quantize(gm, scheme, calibration.split(options.batch))
    )
    session = timed(ours, "file and session", lambda: Session(to_onnx(quantized), options.threads))
    model = timed(naive, "prepare and calibrate", calibrated_naively)
    found: dict[str, list[Tensor]] = {"ours": [], "naive": []}
    for part in images.split(50):

        def on_kernels(x: Tensor = part) -> list[Tensor]:
            return [torch.from_numpy(session.run(b)[0]) for b in x.split(options.batch)]

        found["ours"] += timed(ours, f"{count} images", on_kernels)
        found["naive"].append(timed(naive, f"{count} images", lambda x=part: model(x)))
    print(f"\n{name}, {options.target}, {count} images, {options.threads} threads")
    print(f"{'':32s} {'CPU s':>8s} {'clock s':>8s}")
    totals = []
    for label, clock in (("ours", ours), ("naive", naive)):
        top1 = float((torch.cat(found[label]).argmax(1) == labels).double().mean())
        total = [sum(column) for column in zip(*clock.values(), strict=True)]
        totals.append(total)
        for part, (cpu, wall) in clock.items():
            print(f"{label + ', ' + part:32s} {cpu:8.2f} {wall:8.2f}")
        print(f"{label + ', whole':32s} {total[0]:8.2f} {total[1]:8.2f}   top-1 {top1:.2%}")
    cpu, wall = (b / a for a, b in zip(*totals, strict=True))
    print(f"naive / ours                     {cpu:8.1f} {wall:8.1f}")


def main() -> None:
    """Read the command line and compare on each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="network", help=", ".join(INPUTS))
    parser.add_argument("--images", type=int, default=550)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="of ours; the naive way takes 50")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sys.path.insert(0, str(assets()))
    for name in options.networks or INPUTS:
        compare(name, options)


if __name__ == "__main__":
    main()
