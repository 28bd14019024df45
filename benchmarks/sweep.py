"""Networks from timm and torchvision end to end: trace, trial int8 file, share in int8, agreement, time.

Random weights with batch norm settled on random images; every network in a process of its own. One row a network in
a CSV file; rows that are there already are kept unless named.

    python benchmarks/sweep.py benchmarks/data/sweep.csv              # all that are missing
    python benchmarks/sweep.py some.csv timm/resnet18 torchvision/swin_t
"""

from __future__ import annotations

import argparse
import csv
import logging
import multiprocessing
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sweep_networks import NETWORKS, build, images, settle
from torch import Tensor
from torch.utils import _pytree as pytree

from rewriter import profile, quantize, simulate, target, trace
from rewriter.graph import layers
from rewriter.int8.onnx import opened, to_onnx

FIELDS = (
    *("network", "parameters", "input", "stage", "layers", "opaque"),
    *(
        "int8_share",
        "float_layers",
        "float_ops",
        "file_to_simulation_db",
        "int8_to_float_db",
        "cpu_s",
        "error",
    ),
)
LIMIT_S = 300  # of processor time
WALL_S = 1800
MEMORY = 6 << 30  # address space beyond what torch takes


def outputs(value: Any) -> list[Tensor]:
    """Flat float outputs."""
    found = (torch.as_tensor(o) for o in pytree.tree_leaves(value) if not isinstance(o, str))
    return [o for o in found if o.is_floating_point()]


def decibels(expected: list[Tensor], found: list[Tensor]) -> float:
    """Energy of the expected outputs over that of the difference; the worst output."""
    worst = 200.0
    for a, b in zip(expected, found, strict=True):
        noise = float((a.double() - b.double()).square().sum())
        energy = float(a.double().square().sum())
        if noise > 0 and energy > 0:
            worst = min(worst, 10 * torch.log10(torch.tensor(energy / noise)).item())
    return worst


def measured(name: str, row: dict[str, Any]) -> None:
    """Fill ``row``; what it holds where something raises is how far the network came."""
    row["stage"] = "load"
    model, shape = build(name)
    row["parameters"], row["input"] = (
        sum(p.numel() for p in model.parameters()),
        "x".join(map(str, shape)),
    )
    x = images(8, shape)
    settle(model, x)
    row["stage"] = "trace"
    gm = trace(model, x[:2])
    del model
    row["layers"], row["opaque"] = (
        len(layers(gm)),
        " ".join(sorted({o.kind for o in gm.meta["opaque"]})),
    )
    row["stage"] = "quantize"
    profile(gm, [x])
    quantized = quantize(gm, target("onnxruntime"), [x])
    row["stage"] = "emit"
    file = to_onnx(quantized)
    row["stage"] = "session"
    session, seen = opened(quantized, file, threads=1)
    row["stage"] = "run"
    one, three = session.run(x[:1]), session.run(x[1:4])
    row["stage"] = "agreement"
    with torch.no_grad():
        simulated = outputs(simulate(quantized, kernels=True)(x[1:4]))
        row["int8_to_float_db"] = round(decibels(outputs(gm(x[1:4])), outputs(three)), 1)
    row["file_to_simulation_db"] = round(decibels(simulated, outputs(three)), 1)
    assert all(a.shape[1:] == b.shape[1:] or len(a) != 1 for a, b in zip(one, three, strict=True))
    row["int8_share"] = round(seen.int8_share, 4)
    row["float_ops"] = " ".join(f"{kind}:{n}" for kind, n in sorted(seen.float_ops.items()))
    row["float_layers"] = len(seen.float_layers)
    row["stage"] = "done"


def child(name: str, pipe: Any) -> None:
    """Measure one network and send its row."""
    logging.disable()
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 5))
    row: dict[str, Any] = {"network": name}
    try:
        measured(name, row)
    except BaseException as cause:  # whatever it is, it is what the row is about
        row["error"] = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        traceback.print_exc()
    row["cpu_s"] = round(time.process_time(), 1)
    pipe.send(row)


def in_a_process(child: Callable[[str, Any], None], name: str) -> dict[str, Any]:
    """The row that ``child`` sends through a pipe, from a process of its own, or what became of it."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(name, there))
    process.start()
    there.close()
    try:
        late = {"stage": "late", "error": f"not done after {WALL_S} s"}
        row = here.recv() if here.poll(WALL_S) else late
    except EOFError:
        row = {"stage": "lost", "error": f"the process died, or took more than {LIMIT_S} s"}
    process.kill()
    process.join()
    return row


def one(name: str) -> dict[str, Any]:
    """The row of a network, measured in a process of its own."""
    return {"network": name, **in_a_process(child, name)}


def main() -> None:
    """Measure what is missing from a file, or what is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    if given.file.is_file():
        rows = {r["network"]: r for r in csv.DictReader(given.file.open())}
    for name in given.names or [n for n in NETWORKS if n not in rows]:
        rows[name] = one(name)
        print(rows[name], file=sys.stderr, flush=True)
        with given.file.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[n] for n in sorted(rows))
    done = [r for r in rows.values() if r.get("stage") == "done"]
    print(f"{len(done)} of {len(rows)} end to end")


if __name__ == "__main__":
    main()
