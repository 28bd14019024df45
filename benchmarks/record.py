"""Results as data: one typed record for each measured network and target, which documents quote.

    python -m benchmarks.record RUN_DIR --network NAME --what "..." --data "..."   # results/NAME/TARGET.json

``tests/test_records.py`` reads every record with `Record`, so that none can lack what a reader needs, and
``python -m benchmarks.tables`` makes the tables of README and docs from them.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from pydantic import BaseModel, ConfigDict, Field

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
Interval = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class Row(_Part):
    """One named plan of a record: what a table has a row for."""

    name: str
    plan: str
    summary: str = ""
    float_: float | None = Field(None, alias="float", description="metric in float")
    int8: float | None = None
    int8_interval: Interval | None = None
    damage: float | None = None
    macs: int
    macs_ratio: float
    latency_ms: float | None = None
    weight_bytes: int | None = None


class Baseline(_Part):
    """The network as it is, in float and in plain int8."""

    float_: float | None = Field(alias="float")
    int8: float | None
    int8_interval: Interval | None = None
    macs: int
    damage: float | None


class Record(_Part):
    """What one network is worth under one target. Fractions in [0, 1], MACs per input."""

    format: Literal[1]
    network: str
    what: str = Field(description="architecture and weights, in one line")
    data: str = Field(description="what calibrates and what evaluates, in one line")
    command: str = Field(description="that measured it, as it is typed")
    target: str
    metric: str
    samples: int
    calibration_samples: int | None = None
    baseline: Baseline
    chosen: Row | None = Field(None, description="the plan that the run advises to ship")
    rows: list[Row] = Field(default_factory=list[Row], description="named plans beside it")
    points: list[dict[str, Any]] = Field(description="the front, as in front.json")
    control: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    seconds: float | None = None
    cpu_seconds: float | None = None
    versions: dict[str, str]
    commit: str = ""
    weights: str = Field("", description="file in the project, where they are shipped")


def records() -> dict[str, Record]:
    """All records by ``NETWORK/TARGET``."""
    return {
        f"{file.parent.name}/{file.stem}": Record.model_validate_json(file.read_text())
        for file in sorted(RESULTS.glob("*/*.json"))
    }


def write(record: Record) -> Path:
    """Write a record to its place."""
    file = RESULTS / record.network / f"{record.target}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = record.model_dump(by_alias=True, exclude_none=False)
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file


def record_of(
    folder: Path, network: str, what: str, data: str, command: str = "", **more: Any
) -> Record:
    """The record of a finished run.

    Args:
        folder: The run directory.
        network: What to call it; a folder of ``results/``.
        what: Architecture and weights.
        data: What calibrates and evaluates.
        command: That measured it; by default ``quantfix run`` with the run's config.
        more: Further fields of `Record`.
    """
    front = json.loads((folder / "front.json").read_text())
    facts = json.loads((folder / "run.json").read_text())
    scores = [
        json.loads(line)["score"] for line in (folder / "scores.jsonl").read_text().splitlines()
    ]
    points = [*front["points"], *front["ties"]]
    best = next((p for p in points if p["plan"] == front["best"]), None)
    spent = round(sum(s["seconds"] or 0.0 for s in scores), 1)
    values: dict[str, Any] = {
        "format": 1,
        "network": network,
        "what": what,
        "data": data,
        "command": command or f"quantfix run {facts['config']}",
        **{
            key: front[key]
            for key in ("target", "metric", "samples", "baseline", "points", "control")
        },
        "calibration_samples": facts.get("calibration_samples"),
        "chosen": None if best is None else {"name": "chosen", **best},
        "seconds": spent,
        "versions": versions(),
        "commit": commit(),
    }
    return Record.model_validate(values | more)


def versions() -> dict[str, str]:
    """Of what computed the numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def commit() -> str:
    """The commit that measured, "" outside of a checkout."""
    words = ["git", "rev-parse", "--short=10", "HEAD"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name in ("network", "what", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--command", default="")
    parser.add_argument(
        "--weights", default="", help="file in the project, where they are shipped"
    )
    options = parser.parse_args()
    found = record_of(**vars(options))
    print(write(found).relative_to(ROOT))


if __name__ == "__main__":
    main()
