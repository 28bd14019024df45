"""Measure what tests/conformance/test_conformance.py pins: ``python -m tests.conformance.measure > reference.yaml``.

For each network of the assets and each target: the metric in float, in simulation, in ONNX Runtime as the file is written
(graph optimizations off) and on its int8 kernels; and how far these are from the simulation's outputs. The file as written computes in
floats. How far two runs of one simulation in floats are apart whose convolutions only add in another order (memory layouts) bounds
what can be asked of it: see test_ties.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rewriter import quantize, simulate, target, trace
from rewriter.damage import measure_fidelity
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.session import Session
from search.tasks.classification import Classification
from search.tasks.detection import Detection

NETWORKS = {
    "mcunet": ("classification", {"resolution": 176}),
    "mobilenetv2": ("classification", {"resolution": 224, "normalise": "imagenet"}),
    "yolo_fastest": ("detection", {}),
}
TARGETS = ("onnxruntime", "per_tensor")
CALIBRATION = 64
# What each engine's outputs are compared with.
LIKE = {"kernels": "simulation", "as written": "simulation", "other order": "in floats"}
COUNT = 200  # images, where there are so many: as written, a file runs at a tenth of the kernels' speed


def assets() -> Path:
    """Where the trained networks and images lie."""
    here = Path(__file__).resolve().parents[2]
    return Path(os.environ.get("QUANTFIX_ASSETS", here.parent / "shared" / "assets"))


def zoo() -> Any:
    """The module of factories beside the assets."""
    spec = importlib.util.spec_from_file_location("zoo", assets() / "zoo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = module
    spec.loader.exec_module(module)
    return module


def load(name: str, count: int = COUNT) -> tuple[Any, Any, Tensor, Tensor, Any]:
    """Model, task, calibration inputs, evaluation inputs and targets of one network."""
    module, (kind, args) = zoo(), NETWORKS[name]
    data = module.imagenet(**args) if kind == "classification" else module.coco()
    task: Any = (
        Classification() if kind == "classification" else Detection(module.YoloFastestDecode())
    )
    pairs = [data.evaluation[i] for i in range(min(count, len(data.evaluation)))]
    calibration = torch.stack([data.calibration[i] for i in range(CALIBRATION)])
    inputs = torch.stack([x for x, _ in pairs])
    targets: Any = [y for _, y in pairs]
    if kind == "classification":
        targets = torch.tensor(targets)
    return getattr(module, name)(), task, calibration, inputs, targets


def engines(name: str, scheme: str, count: int = COUNT) -> dict[str, dict[str, float]]:
    """The figures of one network on one target."""
    model, task, calibration, inputs, targets = load(name, count)
    gm = trace(model, calibration[:2])
    fidelity = measure_fidelity(gm, calibration.split(16), purpose=task.purpose)
    quantized = quantize(gm, target(scheme), calibration.split(16))
    file = to_onnx(quantized)
    in_floats = simulate(quantized)
    outputs = {
        "float": _torch(gm, inputs),
        "simulation": _torch(simulate(quantized, kernels=True), inputs),
        "in floats": _torch(in_floats, inputs),
        "other order": _torch(in_floats, inputs, torch.contiguous_format),
        "as written": _runtime(Session(file, optimize=False), inputs),
        "kernels": _runtime(Session(file), inputs),
    }
    rows: dict[str, dict[str, float]] = {}
    for engine, found in outputs.items():
        row = {"metric": round(float(task.score(found, targets)), 4)}
        if engine != "float":
            row["damage"] = round(float(fidelity.damage(found, outputs["float"]).mean()), 4)
        if engine in LIKE:
            expected = outputs[LIKE[engine]]
            row["sqnr_db"] = round(sqnr_db(expected, found), 1)
            if task.metric == "top1":
                same = expected[0].argmax(1) == found[0].argmax(1)
                row["same_top1"] = round(float(same.float().mean()), 4)
        rows[engine] = row
    return rows


# Runtimes besides ONNX Runtime, by the target that they are measured on.
RUNTIMES = {"tflite": "litert", "openvino": "openvino"}
EXACT = 2  # images on which every operation is compared on the runtime's own inputs


def runtime(name: str, scheme: str, count: int = COUNT) -> dict[str, dict[str, Any]]:
    """The figures of one network on the runtime of a target: end to end, and operation by operation."""
    from rewriter.int8 import int8_values, isolated
    from search.engines import engine_named

    model, task, calibration, inputs, targets = load(name, count)
    gm = trace(model, calibration[:2])
    fidelity = measure_fidelity(gm, calibration.split(16), purpose=task.purpose)
    quantized = quantize(gm, target(scheme), calibration.split(16))
    engine = engine_named(RUNTIMES[scheme])
    session = engine.open(engine.emit(quantized), 2, "cpu")
    parts = [session.run(x) for x in inputs.split(16)]
    floats = _torch(gm, inputs)
    # XNNPACK and OpenVINO requantize by floats
    simulation = _torch(simulate(quantized, kernels=True, fixed_point=False), inputs)
    found = [torch.cat(column) for column in zip(*parts, strict=True)]
    rows: dict[str, dict[str, Any]] = {}
    for label, outputs in (("simulation", simulation), (engine.name, found)):
        rows[label] = {
            "metric": round(float(task.score(outputs, targets)), 4),
            "damage": round(float(fidelity.damage(outputs, floats).mean()), 4),
        }
    names, x = int8_values(quantized), inputs[:EXACT]
    compared = isolated(quantized, x, engine.values(quantized, names, x), fixed_point=False)
    differ = [r for r in compared if r.differs > 0.001]
    rows[engine.name]["values"] = len(compared)
    rows[engine.name]["values that differ"] = len(differ)
    rows[engine.name]["kinds that differ"] = sorted({r.kind for r in differ})
    return rows


def sqnr_db(reference: list[Tensor], found: list[Tensor]) -> float:
    """Energy of the reference over that of the difference, 200 dB where there is none."""
    energy = sum(float(r.double().square().sum()) for r in reference)
    noise = sum(
        float((r.double() - f.double()).square().sum())
        for r, f in zip(reference, found, strict=True)
    )
    return min(200.0, 10 * float(torch.tensor(energy / max(noise, 1e-300)).log10()))


def _torch(
    gm: Any, inputs: Tensor, layout: torch.memory_format = torch.channels_last
) -> list[Tensor]:
    parts: list[list[Tensor]] = []
    with torch.no_grad():
        for x in inputs.split(16):
            found = gm(x.contiguous(memory_format=layout))
            parts.append(list(found) if isinstance(found, (tuple, list)) else [found])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _runtime(session: Session, inputs: Tensor) -> list[Tensor]:
    parts = [[torch.from_numpy(o) for o in session.run(x)] for x in inputs.split(16)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


if __name__ == "__main__":
    measured = {
        n: {t: engines(n, t) for t in TARGETS} | {t: runtime(n, t) for t in RUNTIMES}
        for n in NETWORKS
    }
    sys.stdout.write(yaml.safe_dump(measured, sort_keys=False))
