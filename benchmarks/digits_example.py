"""The three embedded examples: train the shipped weights, and measure what documents say of them.

    python -m benchmarks.digits_example train              # search/data/shipped/NAME.safetensors and NAME.json
    python -m benchmarks.digits_example measure            # quantfix run on each; results/NAME/TARGET.json

One seed and one kind of processor give one result when training; others round in another way, and
how much a network loses in int8 differs with it; that is why the weights are shipped. README, docs
and configs quote the records that ``measure`` writes, and ``tests/test_records.py`` compares them.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import safetensors.torch
import sklearn
import torch
from torch import nn

from benchmarks import record
from search.data import digits, digits_detection, digits_video

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Example:
    """One embedded example; ``build`` makes the untrained network, ``train`` trains it."""

    config: str
    seed: int
    what: str
    data: str
    build: Callable[[], nn.Module]
    train: Callable[[Any, int], None]


EXAMPLES = {
    "digits": Example(
        "configs/digits.yaml",
        digits.SEED,
        "classifier in the manner of EfficientNet-Lite, shipped weights",
        "scikit-learn's handwritten digits, 897 of 1797 images; the other 900 evaluate",
        digits.architecture,
        digits.train,
    ),
    "digits_detection": Example(
        "configs/detection_digits.yaml",
        digits_detection.SEED,
        "depthwise detector with one head, shipped weights",
        "1500 scenes composed of the 897 training images; 200 of the other images' evaluate",
        digits_detection.architecture,
        digits_detection.train,
    ),
    "digits_video": Example(
        "configs/video_digits.yaml",
        digits_video.SEED,
        "depthwise network and GRU over frames, shipped weights",
        "1500 sequences composed of the 897 training images; 300 of the other images' evaluate",
        digits_video.VideoDigits,
        digits_video.train,
    ),
}


def versions() -> dict[str, str]:
    """What a result depends on besides code, data and seed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def train(name: str) -> None:
    """Train one example's network with its seed; write its weights and the record of it."""
    example = EXAMPLES[name]
    net = example.build()
    example.train(net, example.seed)
    file = digits.WEIGHTS / f"{name}.safetensors"
    file.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(net.state_dict(), file)
    write(file.with_suffix(".json"), trained_record(name))


def trained_record(name: str) -> dict[str, Any]:
    """How the shipped weights were trained, and what they reach in float."""
    example = EXAMPLES[name]
    found = quantfix("analyze", example.config, "sensitivity.json")
    return {
        "weights": f"{name}.safetensors",
        "command": f"python -m benchmarks.digits_example train {name}",
        "data": example.data,
        "seed": example.seed,
        "versions": versions(),
        **{key: found[key] for key in ("metric", "samples")},
        "float": found["baseline"]["float"],
    }


def measure(name: str) -> None:
    """Run one example's config anew; write its front as the record that documents quote."""
    example, start = EXAMPLES[name], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable,
            "-m",
            "search.cli",
            "run",
            example.config,
            "--out",
            folder,
            "--quiet",
        ]
        subprocess.run(words, cwd=ROOT, check=True)
        found = record.record_of(
            Path(folder),
            name,
            example.what,
            example.data,
            f"quantfix run {example.config}",
            weights=f"search/data/shipped/{name}.safetensors",
            seconds=round(time.perf_counter() - start),
        )
    print(record.write(found).relative_to(ROOT))


def quantfix(command: str, config: str, file: str) -> dict[str, Any]:
    """What a command of the tool writes to a file of its run directory."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "search.cli", command, config, "--out", folder, "--quiet"]
        subprocess.run(words, cwd=ROOT, check=True)
        return json.loads((Path(folder) / file).read_text())


def write(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(file.relative_to(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXAMPLES)}; default: all")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    for name in options.names or EXAMPLES:
        {"train": train, "measure": measure}[options.what](name)


if __name__ == "__main__":
    main()
