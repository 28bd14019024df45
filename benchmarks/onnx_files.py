"""Float ONNX files of several exporters, from import to int8 file: float outputs, names, int8 share, damage, time.

Networks of ``onnx_networks.py`` (random weights, batch norm settled on random images) are exported by each of torch's
two exporters with several operator sets; other float files are named by their paths. Every file in a process of its
own, one row a file in a CSV; rows that are there already are kept unless named.

    python benchmarks/onnx_files.py benchmarks/data/onnx_files.csv              # all that are missing
    python benchmarks/onnx_files.py some.csv resnet18/new18 lstm/old11 path/to/file.onnx
"""

from __future__ import annotations

import argparse
import csv
import logging
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx_networks import EXPORTS, exported
from sweep import LIMIT_S, decibels, in_a_process, outputs
from sweep_networks import images

from rewriter import profile, quantize, target, trace
from rewriter.damage import fidelity_of
from rewriter.graph import layers
from rewriter.int8.onnx import opened, to_onnx
from rewriter.onnx_import import import_onnx
from rewriter.sensitivity import analyze

FIELDS = (
    *("file", "opset", "operators", "batch", "stage", "layers", "float_error", "same_names"),
    *("int8_share", "float_ops", "int8_to_float_db", "worst_layer", "cpu_s", "error"),
)
SAMPLES = 24


def inputs_for(sizes: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, ...]:
    """Smooth random images for inputs that can be images, else Gaussian values."""
    return tuple(
        images(SAMPLES, s) if len(s) >= 2 and min(s[-2:]) > 5 else torch.randn(SAMPLES, *s)
        for s in sizes
    )


def largest_error(path: Path, network: Any, x: tuple[torch.Tensor, ...]) -> float:
    """Largest difference from ONNX Runtime relative to the largest value, of the worst output."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float16)": np.float16, "tensor(double)": np.float64}
    worst = 0.0
    for row in range(3):
        feed = {
            i.name: v[row : row + 1].numpy().astype(kinds.get(i.type, np.float32))
            for i, v in zip(session.get_inputs(), x, strict=True)
        }
        wanted: Any = session.run(None, feed)
        with torch.no_grad():
            found = network(*[v[row : row + 1] for v in x])
        for a, b in zip(wanted, found if isinstance(found, tuple) else (found,), strict=True):
            if a.dtype.kind == "f":
                a = torch.from_numpy(a).double()
                worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-9)))
    return worst


def measured(name: str, row: dict[str, Any], folder: Path) -> None:
    """Fill ``row``; what it holds where something raises is how far the file came."""
    row["stage"] = "export"
    path = Path(name) if name.endswith(".onnx") else exported(name, folder)
    file = onnx.load(str(path), load_external_data=False)
    row["opset"] = max(o.version for o in file.opset_import if o.domain in ("", "ai.onnx"))
    row["operators"] = len(file.graph.node)
    first = file.graph.input[0].type.tensor_type.shape.dim[0]
    row["batch"] = first.dim_value or "free"
    row["stage"] = "import"
    network = import_onnx(path)
    x: Any = inputs_for(network.input_sizes)
    row["float_error"] = f"{largest_error(path, network, x):.1e}"
    row["stage"] = "trace"
    gm = trace(network, x[0][:2] if len(x) == 1 else tuple(v[:2] for v in x))
    row["layers"] = len(layers(gm))
    row["stage"] = "quantize"
    batch: Any = x[0] if len(x) == 1 else x
    profile(gm, [batch])
    quantized = quantize(gm, target("onnxruntime"), [batch])
    row["stage"] = "emit"
    int8 = to_onnx(quantized)
    constants = {t.name for t in file.graph.initializer}
    pairs = (
        ([i.name for i in file.graph.input if i.name not in constants], int8.graph.input),
        ([o.name for o in file.graph.output], int8.graph.output),
    )
    row["same_names"] = all(names == [v.name for v in values] for names, values in pairs)
    row["stage"] = "run"
    session, seen = opened(quantized, int8, threads=1)
    three = session.run(*[v[:3] for v in x]) if len(x) > 1 else session.run(x[0][:3])
    with torch.no_grad():
        wanted = outputs(gm(*[v[:3] for v in x]))
    row["int8_to_float_db"] = round(decibels(wanted, outputs(three)), 1)
    row["int8_share"] = round(seen.int8_share, 4)
    row["float_ops"] = " ".join(f"{kind}:{n}" for kind, n in sorted(seen.float_ops.items()))
    if len(x) == 1:
        row["stage"] = "analyze"
        found = analyze(
            gm, target("onnxruntime"), [x[0]], x[0], top=2, fidelity=fidelity_of(gm, [x[0]])
        )
        row["worst_layer"] = found.layers[0].layer if found.layers else ""
    row["stage"] = "done"


def child(name: str, pipe: Any) -> None:
    """Measure one file and send its row."""
    logging.disable()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 5))
    row: dict[str, Any] = {"file": Path(name).name if name.endswith(".onnx") else name}
    with tempfile.TemporaryDirectory() as folder:
        try:
            measured(name, row, Path(folder))
        except BaseException as cause:  # whatever it is, it is what the row is about
            row["error"] = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
            traceback.print_exc()
    row["cpu_s"] = round(time.process_time(), 1)
    pipe.send(row)


def one(name: str) -> dict[str, Any]:
    """The row of a file, measured in a process of its own."""
    return {"file": name, **in_a_process(child, name)}


def main() -> None:
    """Measure what is missing from a table, or what is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    if given.table.is_file():
        rows = {r["file"]: r for r in csv.DictReader(given.table.open())}
    for name in given.names or [n for n in EXPORTS if n not in rows]:
        row = one(name)
        rows[row["file"]] = row
        print(row, file=sys.stderr, flush=True)
        with given.table.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[n] for n in sorted(rows))
    done = [r for r in rows.values() if r.get("stage") == "done"]
    print(f"{len(done)} of {len(rows)} end to end")


if __name__ == "__main__":
    main()
