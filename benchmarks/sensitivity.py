"""Time and agreement of sensitivity analyses, side by side in one run on the same images.

    python benchmarks/sensitivity.py                       ours and the naive loop
    python benchmarks/sensitivity.py --aimet --modelopt    the peers too, each in an environment made for it
    python benchmarks/sensitivity.py --growth              time against layers and images
    python benchmarks/sensitivity.py --memory              peak memory of the default analysis

The network and the images are those of ../shared/assets ($QUANTFIX_ASSETS). Times are CPU seconds of the process and seconds on the
clock; with one thread (--threads 1, the default) the CPU seconds hardly depend on what else runs, so compare those.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rewriter.damage import fidelity_of, kl_divergence  # noqa: E402
from rewriter.graph.cost import layer_macs  # noqa: E402
from rewriter.graph.interpret import walk  # noqa: E402
from rewriter.graph.lookup import layer_name, layers  # noqa: E402
from rewriter.int8.scheme import QuantScheme, channel_axis, target, weight_scale  # noqa: E402
from rewriter.int8.simulate import Quantized, quantize  # noqa: E402
from rewriter.sensitivity import analyze  # noqa: E402
from rewriter.sensitivity.error_terms import parts_of  # noqa: E402
from rewriter.sensitivity.exact import batch_size, measure  # noqa: E402
from rewriter.sensitivity.ranking_confidence import rank_correlation  # noqa: E402
from rewriter.sensitivity.screen import Screener, Screening  # noqa: E402
from rewriter.sensitivity.shared_prefix import Forks, only  # noqa: E402
from rewriter.tracing.trace import trace  # noqa: E402

PEERS = ROOT / "benchmarks" / "peers"
BUILD = ROOT / "build" / "peers"
# How each peer is installed; what it needs of torch it brings along.
SCRIPTS = {"aimet": "aimet_enable_one.py", "modelopt": "modelopt_gradient.py"}
REQUIREMENTS = {
    "aimet": "aimet-torch safetensors pillow",
    "modelopt": "nvidia-modelopt huggingface_hub requests torch torchvision safetensors pillow",
}


@dataclass(frozen=True)
class Result:
    """Time and damages (by layer) of one method."""

    name: str
    cpu: float
    wall: float
    damage: dict[str, float]


@dataclass(frozen=True)
class Setting:
    """What all methods get."""

    factory: str
    scheme: QuantScheme
    calibration: Tensor
    images: Tensor
    threads: int

    def model(self) -> nn.Module:
        import zoo  # type: ignore[import-not-found]

        return getattr(zoo, self.factory)()


def alone(name: str, run: Callable[[Setting], dict[str, float]], s: Setting) -> Result:
    """Run once in a process of its own: what a method before it has left of the heap spares page faults."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_warm, name, run, s).result()


def _warm(name: str, run: Callable[[Setting], dict[str, float]], s: Setting) -> Result:
    """Timed after a small screening, so that what torch loads at first use is there."""
    torch.set_num_threads(s.threads)
    sys.path.insert(0, str(assets()))
    ours_screen(Setting(s.factory, s.scheme, s.calibration[:16], s.images[:16], s.threads))
    return timed(name, lambda: run(s))


def timed(name: str, run: Callable[[], dict[str, float]]) -> Result:
    """Run once and take both clocks."""
    cpu, wall = time.process_time(), time.perf_counter()
    damage = run()
    return Result(name, time.process_time() - cpu, time.perf_counter() - wall, damage)


def forward(s: Setting) -> dict[str, float]:
    gm = trace(s.model(), s.images[:2])
    batch = batch_size(Forks(Quantized(gm, None, s.scheme)))  # type: ignore[arg-type]
    forward_pass = timed("one float pass", lambda: run_float(gm, s.images, batch))
    report_time(forward_pass)
    return {}


def run_float(gm: Any, images: Tensor, batch: int) -> dict[str, float]:
    with torch.no_grad():
        for part in images.split(batch):
            for _ in walk(gm, (part,)):
                pass
    return {}


def ours_exact(s: Setting) -> dict[str, float]:
    gm = trace(s.model(), s.images[:2])
    q = quantize(gm, s.scheme, s.calibration.split(16))
    forks, parts = Forks(q), parts_of(gm)
    size = batch_size(forks)
    fidelity = fidelity_of(gm, s.calibration.split(16))
    variants = {layer_name(n): only(parts, n) for n in layers(gm)}
    total: dict[str, float] = dict.fromkeys(variants, 0.0)
    for part in s.images.split(size):
        for name, found in measure(forks, fidelity, part, {}, variants):
            total[name] += sum(found["damage"]) / len(s.images)
    return total


def ours_screen(s: Setting, directions: int = 2) -> dict[str, float]:
    gm = trace(s.model(), s.images[:2])
    q = quantize(gm, s.scheme, s.calibration.split(16))
    return screened(q, s.images, directions)


def screened(q: Quantized, images: Tensor, directions: int) -> dict[str, float]:
    forks = Forks(q)
    half = max(1, batch_size(forks) // 2)
    screener = Screener(q, fidelity_of(q.gm, [images]), directions=directions)
    screening = Screening(screener.parts)
    for i, part in enumerate(images.split(half)):
        screening.extend(screener.batch(part, torch.Generator().manual_seed(i)))
    names = {n.name: layer_name(n) for n in layers(q.gm)}
    return {names[n]: d for n, d in screening.layer_damage().items()}


def ours_default(s: Setting) -> dict[str, float]:
    gm = trace(s.model(), s.images[:2])
    found = analyze(gm, s.scheme, s.calibration.split(16), s.images)
    return {x.layer: x.damage for x in found.layers}


# ----------------------------------------------------------------------------------- naive loop


class Observed(nn.Module):
    """One layer with a min-max observer on its input, then with fake quantization."""

    def __init__(self, layer: nn.Module, scheme: QuantScheme) -> None:
        super().__init__()
        self.layer, self.scheme = layer, scheme
        self.low, self.high, self.observing = float("inf"), -float("inf"), True

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self.low = min(self.low, float(x.min()))
            self.high = max(self.high, float(x.max()))
            return self.layer(x)
        spec = self.scheme.activations
        scale, zero = spec.params(self.low, self.high)
        x = torch.fake_quantize_per_tensor_affine(x, scale, zero, spec.qmin, spec.qmax)
        return self.layer(x)

    def convert(self) -> None:
        spec = self.scheme.weights
        spec = self.scheme.linear_weights if isinstance(self.layer, nn.Linear) else spec
        weight: Any = self.layer.weight
        axis = channel_axis(self.layer, spec)
        scale = weight_scale(weight, spec, axis)
        if axis is None:
            args = (weight, float(scale), 0, spec.qmin, spec.qmax)
            rounded = torch.fake_quantize_per_tensor_affine(*args)
        else:
            zero = torch.zeros_like(scale, dtype=torch.int32)
            args = (weight, scale, zero, axis, spec.qmin, spec.qmax)
            rounded = torch.fake_quantize_per_channel_affine(*args)
        self.layer.weight = nn.Parameter(rounded, requires_grad=False)
        self.observing = False


@torch.no_grad()
def naive(s: Setting, batch: int = 50) -> dict[str, float]:
    """Prepare, calibrate and evaluate a copy of the (folded) network for each layer; eager, NCHW."""
    model = trace(s.model(), s.images[:2])
    reference = torch.cat([model(x) for x in s.images.split(batch)])
    found: dict[str, float] = {}
    for node in layers(model):
        prepared = copy.deepcopy(model)
        one = Observed(prepared.get_submodule(str(node.target)), s.scheme)
        prepared.set_submodule(str(node.target), one)
        for x in s.calibration.split(batch):
            prepared(x)
        one.convert()
        outputs = torch.cat([prepared(x) for x in s.images.split(batch)])
        found[layer_name(node)] = float(kl_divergence(outputs, reference).mean())
    return found


# ---------------------------------------------------------------------------------------- peers


def peer(name: str, s: Setting) -> Result | None:
    """Run a peer's script in the environment made for it; None with the reason printed if it fails."""
    python = BUILD / name / "bin" / "python"
    if not python.exists():
        venv.create(BUILD / name, with_pip=True)
        command = [str(python), "-m", "pip", "install", "-q", *REQUIREMENTS[name].split()]
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        if made.returncode:
            print(f"{name}: not installable here: {made.stderr.strip().splitlines()[-1]}")
            return None
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data.npz", Path(folder) / "out.json"
        np.savez(data, calibration=s.calibration.numpy(), images=s.images.numpy())
        options = {
            "factory": s.factory,
            "threads": s.threads,
            "per_channel": s.scheme.weights.ch_axis == 0,
        }
        done = subprocess.run(
            [str(python), str(PEERS / SCRIPTS[name]), str(data), str(out), json.dumps(options)],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(assets())},
        )
        if done.returncode:
            print(f"{name}: failed: {' '.join(done.stderr.strip().splitlines()[-3:])}")
            return None
        found = json.loads(out.read_text())
    return Result(found["name"], found["cpu"], found["wall"], found["damage"])


def report_time(r: Result) -> None:
    print(f"{r.name:44s} {r.cpu:8.2f} CPU s {r.wall:8.2f} s")


def report(results: list[Result], exact: Result) -> None:
    slowest = next((r for r in results if r.name.startswith("naive")), results[-1])
    print(
        f"\n{'method':44s} {'CPU s':>8s} {'clock s':>8s} {'x faster':>9s} {'Spearman':>9s} {'top 5':>6s}"
    )
    for r in results:
        shared = [n for n in exact.damage if n in r.damage]
        rho, top = float("nan"), "-"
        if len(shared) > 2:
            a, b = ([d[n] for n in shared] for d in (exact.damage, r.damage))
            rho = rank_correlation(torch.tensor(a), torch.tensor(b))
            top = str(len(leaders(exact.damage, shared) & leaders(r.damage, shared)))
        ratio = slowest.cpu / r.cpu
        print(f"{r.name:44s} {r.cpu:8.2f} {r.wall:8.2f} {ratio:9.1f} {rho:9.3f} {top:>6s}")
    print(
        f"x faster: than {slowest.name}, by CPU seconds; Spearman and top 5: with our exact damage"
    )


def leaders(damage: dict[str, float], among: list[str]) -> set[str]:
    return set(sorted(among, key=lambda n: -damage[n])[:5])


def growth() -> None:
    """Screening against layers and images, with networks of timm, random weights, small images."""
    import timm

    print(
        f"\n{'network':18s} {'layers':>6s} {'MMACs':>7s} {'images':>6s} {'pass s':>8s} {'screen s':>9s} {'passes':>7s}"
    )
    for name in ("efficientnet_b0", "efficientnet_b4"):
        for count in (8, 16, 32):
            torch.manual_seed(0)
            images = torch.randn(count, 3, 96, 96)
            gm = trace(timm.create_model(name, pretrained=False).eval(), images[:2])
            q = quantize(gm, target("onnxruntime"), [images[:8]])
            size = batch_size(Forks(q))
            one = timed("pass", lambda gm=gm, x=images, b=size: run_float(gm, x, b))
            all_ = timed("screen", lambda q=q, x=images: screened(q, x, 1))
            macs = sum(layer_macs(gm).values()) / 1e6
            line = f"{name:18s} {len(layers(gm)):6d} {macs:7.0f} {count:6d} {one.cpu:8.2f}"
            print(f"{line} {all_.cpu:9.2f} {all_.cpu / one.cpu:7.1f}")


def memory(s: Setting) -> None:
    """Peak resident memory of the default analysis over that of the loaded network and images."""
    gm = trace(s.model(), s.images[:2])
    size = batch_size(Forks(Quantized(gm, None, s.scheme)))  # type: ignore[arg-type]
    with torch.no_grad():
        gm(s.images[:1])
    live = live_bytes(gm) * size
    before = peak_mib(reset=True)
    analyze(gm, s.scheme, s.calibration.split(16), s.images)
    after = peak_mib()
    allowed = 3 * live / 2**20 + 300
    print(
        f"peak memory: {after - before:.0f} MiB over network and images; three batches of {size} live"
    )
    print(f"activations ({live / 2**20:.0f} MiB each) and 300 MiB: {allowed:.0f} MiB")


def peak_mib(reset: bool = False) -> float:
    """Largest resident memory of this process so far; ``reset``: forget what was before, where the system lets us."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            print("the peak before the analysis is not forgotten here: the figure is too low")
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def live_bytes(gm: Any) -> int:
    """The most that is alive at once in a pass over one input."""
    forks = Forks(Quantized(gm, None, target("onnxruntime")))  # type: ignore[arg-type]
    alive, most = 0, 0
    for node, dying in zip(forks.nodes, forks.dying, strict=True):
        alive += value_bytes(node)
        most = max(most, alive)
        alive -= sum(map(value_bytes, dying))
    return most


def value_bytes(node: Any) -> int:
    shape = node.meta["shape"]
    return 4 * int(np.prod(shape)) if isinstance(shape, tuple) else 0


def assets() -> Path:
    return Path(os.environ.get("QUANTFIX_ASSETS") or ROOT.parent / "shared" / "assets")


def setting(options: argparse.Namespace) -> Setting:
    sys.path.insert(0, str(assets()))
    import zoo  # type: ignore[import-not-found]

    data = zoo.imagenet(
        *{"mcunet": (176, "half"), "mobilenetv2": (224, "imagenet")}[options.network]
    )
    calibration = torch.stack([data.calibration[i] for i in range(64)])
    images = torch.stack([data.evaluation[i][0] for i in range(options.images)])
    return Setting(options.network, target(options.target), calibration, images, options.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="mcunet", choices=["mcunet", "mobilenetv2"])
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    for name in ("aimet", "modelopt", "growth", "memory", "no-naive"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.growth:
        growth()
        return
    s = setting(options)
    if options.memory:
        memory(s)
        return
    print(f"{s.factory}, {s.scheme.name}, {options.images} images, {s.threads} threads")
    forward(s)
    exact = alone("ours, exact, all layers", ours_exact, s)
    results = [
        alone("ours, screening, 1 direction", partial(ours_screen, directions=1), s),
        alone("ours, screening, 2 directions", ours_screen, s),
        alone("ours, default (screen + measure + causes)", ours_default, s),
        exact,
    ]
    found = [peer(n, s) for n in ("aimet", "modelopt") if getattr(options, n)]
    results += [r for r in found if r is not None]
    if not options.no_naive:
        results.append(alone("naive loop, for each layer", naive, s))
    report(results, exact)


if __name__ == "__main__":
    main()
