"""A run with as many plans on its front as one asks for, with controls, free remedies and wild ranges: for looking at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from search.report.snapshot_network import trimmed
from search.results import Results, load_results
from search.run_dir.files import write_json
from search.run_dir.scores import Records, Samples, Score, fingerprint

PARTS = {"model": "long"}
MACS, BLOCKS, IMAGES = 385_000_000, 16, 400
REPAIRS = "refine_ranges@model correct_bias@model round_weights@model"


def places() -> dict[str, list[str]]:
    found = {"conv_stem": ["conv_stem", "conv"]}
    for i in range(BLOCKS):
        for kind, part in (("pointwise", "pw"), ("depthwise", "dw"), ("pointwise", "pwl")):
            found[f"blocks_{i}_{part}"] = [f"blocks.{i}.{part}", kind]
    return found | {"classifier": ["classifier", "linear"]}


def make_front(folder: Path, count: int, **facts: Any) -> Results:
    """A run directory whose front has `count` plans from .7 to 1.15 of the MACs."""
    records = Records(folder, fingerprint(PARTS))
    random = np.random.default_rng(0)
    hardness = random.uniform(size=IMAGES)

    def add(plan: str, ratio: float, damage: float, **more: Any) -> None:
        right = (hardness > 0.17 + 0.35 * damage).astype(float)
        top = float(right.mean())
        known: dict[str, Any] = {
            "macs": round(MACS * ratio), "macs_ratio": ratio, "metric": top, "damage": damage,
            "interval": (top - 0.012, min(top + 0.012, 1.0)), "metric_float": 0.83, "samples": IMAGES,
            "engine": "onnxruntime", "engine_version": "1.32", "int8_share": 1.0, "float_ops": {},
            "params": 4_650_000, "weight_bytes": round(4_650_000 * ratio),
        }  # fmt: skip
        values = Samples(np.full(IMAGES, damage) * random.uniform(0.5, 1.5, IMAGES), right)
        records.add(Score(plan, **(known | more)), values)

    add("", 1.0, 0.5)
    add("refine_ranges@model", 1.0, 0.32)
    add("correct_bias@model refine_ranges@model", 1.0, 0.2)
    add(REPAIRS, 1.0, 0.12)
    for i, ratio in enumerate(np.linspace(0.7, 1.15, count)):
        thinned = max(0, round(BLOCKS * (1 - ratio) * 2))
        steps = [f"thin_channels_{(88, 75, 62)[j % 3]}@blocks_{j}_pw" for j in range(thinned)]
        steps += ["merge_separable@blocks_0_dw"] if ratio > 1 else []
        steps += [f"split_range_{2 + i % 3}@blocks_{i % BLOCKS}_pwl", *REPAIRS.split()]
        add(" ".join(sorted(steps)), float(ratio), float(0.42 * np.exp(-4.6 * (ratio - 0.7))))
    for percent, ratio in ((93, 0.865), (86, 0.74)):
        add(f"lower_resolution_{percent}@model {REPAIRS}", ratio, 0.9 - 0.7 * ratio)
    for i in range(2 * count):
        ratio = float(random.uniform(0.7, 1.15))
        damage = float(0.42 * np.exp(-4.6 * (ratio - 0.7)) + random.uniform(0.08, 0.5))
        add(
            f"keep_float@blocks_{i % BLOCKS}_dw split_range_2@blocks_{i // BLOCKS}_pw",
            ratio,
            damage,
        )
    ranked = [n for n in places() if n != "classifier"]
    layers: list[dict[str, Any]] = [
        {
            "layer": places()[n][0], "node": n, "kind": places()[n][1], "macs": 10**6,
            "damage": 0.3 / (i + 1) ** 1.6, "causes": [CAUSES[i % len(CAUSES)]],
            "answers": [f"merge_separable@{n}", f"keep_float@{n}"],
        }
        for i, n in enumerate(sorted(ranked, key=lambda n: (n != "blocks_0_dw", n != "conv_stem", n)))
    ]  # fmt: skip
    for i in range(1, 4):
        kept = " ".join(sorted(f"keep_float@{d['node']}" for d in layers[:i]))
        add(kept, 1.0, 0.5 - 0.1 * i, float_layers=i)
    baseline = {"float": 0.83, "int8": records.scores()[0].metric, "macs": MACS, "damage": 0.5}
    head = {"target": "per_tensor", "metric": "top1", "higher_is_better": True, "samples": IMAGES}
    write_json(
        folder / "sensitivity.json",
        {**head, "engine": "onnxruntime", "exact": False, "fingerprint": records.fingerprint,
         "baseline": baseline, "layers": layers},
    )  # fmt: skip
    ladder = [
        ["plain int8", "", True],
        ["better ranges", "refine_ranges@model", True],
        ["bias correction", "correct_bias@model refine_ranges@model", True],
        ["rounding", REPAIRS, True],
    ]
    about: dict[str, Any] = {
        "config": "configs/efficientnet_lite0.yaml", "task": "classification", "engine": "onnxruntime",
        "calibration_samples": 100, "versions": {"torch": "2.15", "onnxruntime": "1.32"},
        "objective": "metric", "limits": {"macs": 1.15 * MACS, "float_layers": 2}, "baseline": baseline,
        "parts": PARTS, "places": places(), "ladder": ladder, "options": {"trials": 60, "seed": 0},
    } | head | facts  # fmt: skip
    write_json(folder / "run.json", about)
    return load_results(folder)


def exhibits(results: Results) -> dict[str, Any]:
    """Pictures of a network with residual sums, of which a layer's widest channel is a million times the others."""
    before: list[dict[str, Any]] = []
    last, trunk = "", ""
    for name, (layer, kind) in places().items():
        entry = {
            "name": name,
            "layer": layer,
            "kind": kind,
            "size": "32 to 32, 3x3",
            "made_by": "",
            "in_float": False,
        }
        before.append({**entry, "reads": [last] if last else []})
        last = name
        if name.endswith("_pwl"):
            if trunk:
                total = {**entry, "name": f"add_{name}", "layer": "", "kind": "add", "size": ""}
                before.append({**total, "reads": [trunk, name]})
                last = f"add_{name}"
            trunk = last
    after = [dict(d) for d in before if d["name"] != "blocks_0_dw"]
    for entry in after:
        if entry["name"] == "blocks_0_pwl":
            entry |= {
                "made_by": "merge_separable@blocks_0_dw",
                "size": "32 to 16, 3x3",
                "reads": ["blocks_0_pw"],
            }
    ranges: list[dict[str, Any]] = []
    random = np.random.default_rng(1)
    for i, (name, (layer, _)) in enumerate(places().items()):
        high = random.uniform(0.1, 1.0, 32)
        high[3] = (1e6, 1.5, 40.0)[i % 3]
        tensor = {
            "name": name, "low": (-high).tolist(), "high": high.tolist(),
            "limits": [-float(high.max()), float(high.max())],
        }  # fmt: skip
        kept = {k: [trimmed(tensor, 28)] for k in ("weights", "reads", "writes")}
        wide = {k: float(high.max() / np.median(high)) for k in kept}
        ranges.append({"layer": layer, "node": name, "before": kept, "after": kept,
                       "spread": {"before": wide, "after": wide}})  # fmt: skip
    return {
        "plan": results.best().plan, "before": before, "after": after, "ranges": ranges, "ranges_shown": 3,
        "calibration_samples": 100, "outputs": None,
    }  # fmt: skip


CAUSES = (
    "weight_channel_spread",
    "activation_channel_spread",
    "activation_outliers",
    "shared_range",
)
