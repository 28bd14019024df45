"""Every engine side by side: float torch, the int8 simulation, ONNX Runtime float and int8.

    python benchmarks/engines.py                    # the three networks of the assets
    python benchmarks/engines.py mcunet --batches 1 10 --target per_tensor

The engines take turns on the same batch, so that other work on the machine disturbs all of them
alike: read the ratios, not the milliseconds. On a busy machine give --threads 1, which measures
processor time; several threads that wait for each other measure the others' work. Also prints
what one candidate costs before its first image: emitting the file and making the session.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from rewriter import quantize, simulate, target, trace
from rewriter.graph.lookup import layers
from rewriter.int8.onnx.export import float_onnx, to_onnx
from rewriter.int8.onnx.session import Session

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"mcunet": 176, "mobilenetv2": 224, "yolo_fastest": 320}
CLIPS = frozenset({nn.ReLU, nn.ReLU6, nn.Hardtanh})


def network(name: str) -> nn.Module:
    """A trained network of the assets."""
    folder = Path(os.environ.get("QUANTFIX_ASSETS") or ROOT.parent / "shared" / "assets")
    spec = importlib.util.spec_from_file_location("zoo", folder / "zoo.py")
    if spec is None or spec.loader is None or not (folder / "zoo.py").is_file():
        raise SystemExit(f"no assets at {folder}; QUANTFIX_ASSETS says where they are")
    sys.modules["zoo"] = zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    return getattr(zoo, name)()


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that one call took, and its result; processor time where there is one thread."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = action()
    return clock() - start, result


def torch_engine(model: nn.Module, memory_format: torch.memory_format) -> Callable[[Tensor], Any]:
    """A torch module in one memory layout as a function of a batch."""
    model = model.to(memory_format=memory_format)  # type: ignore[call-overload]

    def run(x: Tensor) -> Any:
        with torch.inference_mode():
            return model(x.contiguous(memory_format=memory_format))

    return run


def take_turns(
    engines: dict[str, Callable[[Tensor], Any]], x: Tensor, rounds: int
) -> dict[str, float]:
    """Median milliseconds per image of each engine, the engines taking turns on the same batch."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, run in engines.items():
            taken = timed(lambda run=run: run(x))[0]
            if turn:  # the first turn warms up
                seconds[name].append(taken)
    return {name: 1e3 * statistics.median(s) / len(x) for name, s in seconds.items()}


def report(name: str, options: argparse.Namespace) -> None:
    """Print what one network costs on every engine."""
    torch.manual_seed(0)
    model, size = network(name), SIZES[name]
    x = torch.rand(max(options.batches), 3, size, size) * (1 if name == "yolo_fastest" else 4)
    x = x if name == "yolo_fastest" else x - 2
    gm = trace(model, x[:1])
    scheme = target(options.target)
    if options.fuse_clips_only:
        scheme = dataclasses.replace(scheme, fuses=CLIPS)
    quantized = quantize(gm, scheme, [x[:8]])
    emissions = [timed(lambda: to_onnx(quantized)) for _ in range(3)]
    int8 = emissions[0][1]
    sessions = [timed(lambda: Session(int8, options.threads)) for _ in range(3)]
    engines = {
        "torch float, NCHW": torch_engine(model, torch.contiguous_format),
        "torch float, channels_last": torch_engine(network(name), torch.channels_last),
        "simulation, NCHW": torch_engine(simulate(quantized), torch.contiguous_format),
        "simulation, channels_last": torch_engine(simulate(quantized), torch.channels_last),
        "ONNX Runtime float": Session(float_onnx(gm), options.threads).run,
        "ONNX Runtime int8": sessions[0][1].run,
    }
    with TemporaryDirectory() as folder:
        Session(int8, options.threads, save_optimized=Path(folder) / "optimized.onnx")
        kinds = Counter(n.op_type for n in onnx.load(Path(folder) / "optimized.onnx").graph.node)
    in_int8 = kinds["QLinearConv"] + kinds["QGemm"]
    print(f"\n{name}, {options.target}, {options.threads} threads")
    print(f"  emit int8 file   {min(t for t, _ in emissions):6.3f} s")
    print(f"  make the session {min(t for t, _ in sessions):6.3f} s")
    print(f"  layers in int8 kernels: {in_int8} of {len(layers(gm))}")
    print(
        f"  {'ms per image (ratio to int8 kernels)':38s}"
        + "".join(f"{f'batch {b}':>18s}" for b in options.batches)
    )
    columns = [take_turns(engines, x[:b], options.rounds) for b in options.batches]
    for engine in engines:
        cells = (f"{c[engine]:9.2f} ({c[engine] / c['ONNX Runtime int8']:5.2f})" for c in columns)
        print(f"  {engine:38s}" + "".join(f"{cell:>18s}" for cell in cells))


def main() -> None:
    """Read the command line and report on each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="network", help=", ".join(SIZES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument(
        "--fuse-clips-only",
        action="store_true",
        help="quantize before every activation but ReLU, ReLU6 and Hardtanh",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.networks or SIZES:
        report(name, options)


if __name__ == "__main__":
    main()
