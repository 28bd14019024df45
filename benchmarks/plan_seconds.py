"""CPU seconds that a new plan costs, phase by phase, in two trees of this project side by side in one run.

    python benchmarks/plan_seconds.py mcunet                       this tree alone
    python benchmarks/plan_seconds.py mcunet --before ../before    and another checkout (``git worktree add``)

Each tree has a process of its own; they take turns plan by plan, so that other work on the machine disturbs both alike. A
plan has all four free repairs, and one more step at a place of its own, as in a search. Seconds are CPU seconds of
the process: compare the ratios. What is measured of a network once for all plans is the line "once".
Networks: those of the assets, and ``silu640`` and ``resnet50``, random weights on random images.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPAIRS = "equalize@model refine_ranges@model correct_bias@model round_weights@model"
NETWORKS = {"mcunet": "mcunet", "lite0": "efficientnet_lite0", "yolo": "yolo_fastest"}
# Places are taken of these rules in turn.
RULES = ("split_range_2", "keep_float", "split_weights_2", "split_range_3", "split_head_auto")
PHASES = {
    "rewrite": [("rewriter.assemble", ("rewrite", "fit", "copy_graph"))],
    "influence": [
        ("rewriter.assemble", ("weigh", "profile")),
        ("rewriter.damage.measured", ("weigh", "profile")),
    ],
    "calibrate": [("rewriter.assemble", ("quantize", "calibrated"))],
    "ranges": [("rewriter.assemble", ("least_damage_ranges", "refined"))],
    "biases and rounding": [("rewriter.assemble", ("refine",))],
    "digests and store": [
        ("rewriter.assemble", ("graph_digest", "data_digest", "save_to", "load")),
        ("rewriter.damage.measured", ("graph_digest", "data_digest", "save_to", "load")),
    ],
    "file and session": [
        ("search.engines.onnxruntime", ("to_onnx", "Session", "opened")),
        ("search.scoring.evaluator", ("to_onnx", "Session")),
        ("search.evaluator", ("to_onnx", "Session")),
    ],
}


class Clock:
    """CPU seconds by phase; those of a phase inside another count once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        start = time.process_time()
        self.inner.append(0.0)
        try:
            yield
        finally:
            spent = time.process_time() - start
            self.seconds[name] += spent - self.inner.pop()
            self.inner[-1] += spent

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed

    def watch(self) -> None:
        """Time every function of ``PHASES`` that this tree has."""
        for phase, places in PHASES.items():
            for module, names in places:
                found = imported(module)
                for name in names:
                    if hasattr(found, name):
                        setattr(found, name, self.wrapped(phase, getattr(found, name)))


def imported(*names: str) -> Any:
    """The first of some modules that this tree has; None where it has none."""
    for name in names:
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    return None


def random_network(name: str, folder: Path) -> Path:
    """The config of a network with random weights on random images: time and memory alone mean anything."""
    size = 640 if name == "silu640" else 224
    (folder / "made.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "from plan_seconds import SiluDetector, random_data, resnet50\n"
        "from typing import Any\n"
        f"def model() -> Any: return {'SiluDetector()' if name == 'silu640' else 'resnet50()'}\n"
        f"def data() -> Any: return random_data({size})\n"
    )
    path = folder / f"{name}.yaml"
    path.write_text(
        "task: other\nmodel: {factory: 'made:model'}\ndata: {factory: 'made:data'}\ntarget: onnxruntime\n"
    )
    return path


def resnet50() -> Any:
    """The ResNet-50 of timm with random weights."""
    import timm
    import torch

    torch.manual_seed(0)
    return timm.create_model("resnet50", pretrained=False).eval()


def random_data(size: int) -> Any:
    """Smooth random images, 32 to calibrate and 32 to evaluate."""
    from types import SimpleNamespace

    import torch

    torch.manual_seed(1)
    coarse = torch.randn(64, 3, size // 16, size // 16)
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return SimpleNamespace(calibration=list(fine[:32]), evaluation=list(fine[32:]))


def _silu_detector() -> type:
    import torch
    from torch import Tensor, nn

    def conv(i: int, o: int, k: int = 3, s: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.SiLU()
        )

    class Split(nn.Module):
        """Two 3x3 convolutions on half of the channels, and all joined by a 1x1."""

        def __init__(self, i: int, o: int, count: int, add: bool = True) -> None:
            super().__init__()
            half = o // 2
            self.first, self.add = conv(i, o, 1), add
            self.inner = nn.ModuleList(
                nn.Sequential(conv(half, half), conv(half, half)) for _ in range(count)
            )
            self.last = conv((2 + count) * half, o, 1)

        def forward(self, x: Tensor) -> Tensor:
            parts = list(self.first(x).chunk(2, 1))
            for block in self.inner:
                y = block(parts[-1])
                parts.append(parts[-1] + y if self.add else y)
            return self.last(torch.cat(parts, 1))

    class SiluDetector(nn.Module):
        """The size and shape of a nano detector at 640 px: 4.4 GMACs, three heads of 144 channels."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem = nn.Sequential(conv(3, 16, 3, 2), conv(16, 32, 3, 2), Split(32, 32, 1))
            self.p3 = nn.Sequential(conv(32, 64, 3, 2), Split(64, 64, 2))
            self.p4 = nn.Sequential(conv(64, 128, 3, 2), Split(128, 128, 2))
            self.p5 = nn.Sequential(conv(128, 256, 3, 2), Split(256, 256, 1))
            self.up = nn.Upsample(scale_factor=2, mode="nearest")
            self.n4 = Split(384, 128, 1, add=False)
            self.n3 = Split(192, 64, 1, add=False)
            self.down3, self.m4 = conv(64, 64, 3, 2), Split(192, 128, 1, add=False)
            self.down4, self.m5 = conv(128, 128, 3, 2), Split(384, 256, 1, add=False)
            self.heads = nn.ModuleList(
                nn.ModuleList(
                    nn.Sequential(conv(c, m), conv(m, m), nn.Conv2d(m, o, 1))
                    for m, o in ((64, 64), (80, 80))
                )
                for c in (64, 128, 256)
            )

        def forward(self, x: Tensor) -> list[Tensor]:
            p3 = self.p3(self.stem(x))
            p4 = self.p4(p3)
            p5 = self.p5(p4)
            n4 = self.n4(torch.cat([self.up(p5), p4], 1))
            n3 = self.n3(torch.cat([self.up(n4), p3], 1))
            m4 = self.m4(torch.cat([self.down3(n3), n4], 1))
            m5 = self.m5(torch.cat([self.down4(m4), p5], 1))
            heads: Any = self.heads
            return [h(v) for v, pair in zip((n3, m4, m5), heads, strict=True) for h in pair]

    return SiluDetector


def __getattr__(name: str) -> Any:  # torch is imported by those processes alone that run it
    if name == "SiluDetector":
        return lambda: _silu_detector()().eval()
    raise AttributeError(name)


def work(network: str, tree: Path, images: int | None) -> None:
    """Score the plans that come in on stdin, one a line; answer each with a line of JSON."""
    sys.path.insert(0, str(tree))
    import torch

    torch.set_num_threads(1)
    from rewriter import Plan, find_sites
    from rewriter.assemble import prepare
    from search.job import open_job
    from search.scoring.bench import Once

    load_config = imported("search.config.schema", "search.config").load_config

    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if network in NETWORKS:
            config = assets() / f"{NETWORKS[network]}.yaml"
        else:
            config = random_network(network, folder)
        job = open_job(load_config(config), folder / "run", threads=1)
        evaluator = job.evaluator
        if images is not None:
            samples = cut(evaluator.samples, images)
            evaluator = replace(evaluator, samples=samples, confirmations=None, once=Once())
        loaded = time.process_time()
        clock.watch()
        evaluator.reference()
        evaluator.measured.float_metric(evaluator.choosing)
        prepare(evaluator.gm, evaluator.calibration, evaluator.store)
        once = time.process_time() - loaded
        sites = [f"{s.rule}@{s.anchor}" for s in find_sites(evaluator.gm) if not s.blocked]
        print(json.dumps({"once": once, "sites": sites}), flush=True)
        for line in sys.stdin:
            clock.seconds.clear()
            start = time.process_time()
            ((score, _),) = evaluator.measure(Plan.parse(line.strip()), [evaluator.choosing])
            total = time.process_time() - start
            clock.seconds["run and compare"] = total - sum(clock.seconds.values())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            said = {
                "seconds": clock.seconds,
                "total": total,
                "damage": score.damage,
                "metric": score.metric,
                "error": score.error,
                "peak": peak,
            }
            print(json.dumps(said), flush=True)


def cut(samples: Any, count: int) -> Any:
    """The first samples of a set."""
    targets = None if samples.targets is None else samples.targets[:count]
    inputs = None if samples.inputs is None else samples.inputs[:count]
    return replace(
        samples, count=count, inputs=inputs, targets=targets, order=samples.order[:count]
    )


def assets() -> Path:
    """Where the networks and images are."""
    import os

    return Path(os.environ.get("QUANTFIX_ASSETS", ROOT.parent / "shared" / "assets")).resolve()


def plans_for(sites: list[str], count: int) -> list[str]:
    """The repairs alone, without one of them each, and on top of places all over the network."""
    words = REPAIRS.split()
    found = [REPAIRS]
    places = {rule: [s for s in sites if s.startswith(f"{rule}@")] for rule in RULES}
    for i in range(count):
        kind = [r for r in RULES if places[r]][i % len([r for r in RULES if places[r]])]
        here = places[kind]
        found.append(f"{here[(i * 7919) % len(here)]} {' '.join(words)}")
    return list(dict.fromkeys(found))[:count]


class Worker:
    """A process that scores plans in one tree."""

    def __init__(self, network: str, tree: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, network, "--work-in", str(tree)]
        if options.images is not None:
            command += ["--images", str(options.images)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.said: list[dict[str, Any]] = []
        self.first = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker died")
        return json.loads(line)

    def score(self, plan: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(plan + "\n")
        self.process.stdin.flush()
        self.said.append(self.read())

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(network: str, options: argparse.Namespace) -> None:
    """Print one network's table."""
    trees = {"this tree": ROOT}
    if options.before is not None:
        trees = {"before": options.before.resolve(), **trees}
    workers = {name: Worker(network, tree, options) for name, tree in trees.items()}
    plans = options.plan or plans_for(next(iter(workers.values())).first["sites"], options.plans)
    for plan in plans:
        for worker in workers.values():
            worker.score(plan)
        seen = [w.said[-1] for w in workers.values()]
        note = ", ".join(f"{s['total']:.1f} s damage {s['damage'] or 0:.4f}" for s in seen)
        errors = {s["error"] for s in seen} - {None}
        print(f"  {plan.replace(REPAIRS, '+ repairs')}: {note} {errors or ''}", flush=True)
    for worker in workers.values():
        worker.end()
    print(f"\n{network}: median CPU seconds over {len(plans)} new plans")
    print(f"{'':24s}" + "".join(f"{name:>12s}" for name in workers))
    phases = list(dict.fromkeys(p for w in workers.values() for s in w.said for p in s["seconds"]))
    rows = {
        p: [median(s["seconds"].get(p, 0.0) for s in w.said) for w in workers.values()]
        for p in phases
    }
    rows["a new plan"] = [median(s["total"] for s in w.said) for w in workers.values()]
    rows["once"] = [w.first["once"] for w in workers.values()]
    rows["peak GiB"] = [w.said[-1]["peak"] for w in workers.values()]
    rows["damage, mean"] = [
        statistics.mean(s["damage"] for s in w.said if s["damage"] is not None)
        for w in workers.values()
    ]
    for label, values in rows.items():
        ratio = f"{values[0] / values[1]:10.1f}x" if len(values) > 1 and values[1] > 0 else ""
        digits = 4 if label == "damage, mean" else 2
        print(f"{label:24s}" + "".join(f"{v:12.{digits}f}" for v in values) + ratio)


def median(values: Any) -> float:
    return statistics.median(list(values))


def main() -> None:
    """Read the command line and measure each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="+", help="mcunet, lite0, yolo, silu640, resnet50")
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--plans", type=int, default=8)
    parser.add_argument("--plan", action="append", help="this plan, instead of those chosen")
    parser.add_argument("--images", type=int, help="evaluation images; default all")
    parser.add_argument("--work-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for network in options.networks:
        if options.work_in is not None:
            work(network, options.work_in, options.images)
        else:
            compare(network, options)


if __name__ == "__main__":
    main()
