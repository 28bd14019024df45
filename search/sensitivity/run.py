"""Which layers int8 breaks, why, and which rules answer them, in the run directory."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.graph import copy_graph, facts, layers
from rewriter.plan import Plan
from rewriter.sensitivity import analyze as analyze_layers
from rewriter.sensitivity import float_gains
from search.run_dir.files import RunError, read_json, write_json
from search.run_dir.scores import Baseline
from search.run_dir.validation import checked
from search.scoring.evaluator import RewriteEvaluator, Tick
from search.sensitivity.notes import NOTED_SHARE, remarks

log = logging.getLogger(__name__)

# Samples on which layers are measured: the order is settled long before. With --exact, all of them.
MAX_SAMPLES = 256
FEW = 128  # for what each worker of a search does anew: more is not worth its time
# Of the damage of plain int8: what does less is not shown as harmful.
HARMFUL_SHARE = 0.01


@dataclass(frozen=True)
class Layer:
    """One weighted layer, as `rewriter.sensitivity.LayerDamage` has more fully."""

    layer: str
    node: str
    kind: str
    macs: int
    damage: float
    metric: float | None = None
    drop: float | None = None
    sqnr_db: float | None = None
    exact: bool = False
    samples: int = 0
    interval: tuple[float, float] | None = None
    causes: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Value:
    """One tensor between layers, alone in int8.

    Attributes:
        value: Name in the graph.
        layer: That makes it; "" where none does.
        feeds: Layers that read it.
        damage: Of its range alone.
    """

    value: str
    layer: str
    feeds: tuple[str, ...]
    damage: float


@dataclass(frozen=True)
class Sensitivity:
    """The layers of a network, most harmful first, and what they are compared with."""

    target: str
    metric: str
    higher_is_better: bool
    samples: int
    engine: str
    baseline: Baseline
    layers: tuple[Layer, ...]
    layer_samples: int = 0
    values: tuple[Value, ...] = ()
    remarks: tuple[str, ...] = ()
    whole: float | None = None  # damage of plain int8 where the layers were measured

    def counts(self, damage: float) -> bool:
        """Whether a damage is more than a hundredth of that of plain int8: less is not what hurts."""
        return damage > HARMFUL_SHARE * (self.whole or 0.0)

    def uncharged(self) -> list[Value]:
        """Values that hurt and that no layer reads (an activation or an output does), so that none is charged."""
        least = NOTED_SHARE * (self.whole or 0.0)
        return [v for v in self.values if not v.feeds and v.damage > 0 and v.damage >= least]

    def damage_by_node(self) -> dict[str, float]:
        """Damage of each layer alone, by the node name that plans use."""
        return {d.node: d.damage for d in self.layers}


def analyze(
    evaluator: RewriteEvaluator,
    folder: Path,
    *,
    exact: bool = False,
    tick: Tick = lambda done, total: None,
) -> Sensitivity:
    """Rank the layers and write ``sensitivity.json``; a killed analysis goes on where it was.

    Args:
        evaluator: Of the run.
        folder: The run directory.
        exact: Measure every layer, not only the most harmful ones of the screening.
        tick: Told how far it is.
    """
    baseline = evaluator.baseline()
    count = evaluator.samples.count
    inputs = _first_inputs(evaluator, count if exact else min(count, MAX_SAMPLES))
    targets = evaluator.samples.targets
    metric = None if targets is None else _per_sample(evaluator)
    found = analyze_layers(
        copy_graph(evaluator.gm).to(evaluator.device),
        evaluator.scheme,
        evaluator.calibration,
        inputs,
        targets=None if metric is None or targets is None else targets[: len(inputs)],
        metric=metric,
        metric_name=evaluator.task.metric,
        higher_is_better=evaluator.task.higher_is_better,
        fidelity=facts.FIDELITY.get(evaluator.gm),
        exact=exact,
        seed=evaluator.seed,
        journal=folder / "sensitivity.jsonl",
        progress=lambda done, total: tick(int(done), int(total)),
    )
    content = found.to_json()
    content["simulated_baseline"] = content["baseline"]
    ends = _ends(evaluator.gm)
    content["values"] = [v | {"ends": v["value"] in ends} for v in content["values"]]
    content |= {
        "baseline": asdict(baseline),
        "samples": count,
        "layer_samples": max(len(inputs) if exact else 0, *(r.samples for r in found.layers)),
        "engine": "simulate",
        "opaque": [asdict(part) for part in facts.OPAQUE.of(evaluator.gm)],
        "exact": exact,
        "fingerprint": evaluator.records.fingerprint,
    }
    write_json(folder / "sensitivity.json", content)
    known = read_sensitivity(folder)
    assert known is not None
    return known


def float_gains_on(evaluator: RewriteEvaluator, plan: Plan) -> dict[str, float]:
    """What each layer in float takes off the damage that is left with a plan, by layer name; see `rewriter.sensitivity.float_gains`."""
    quantized = evaluator.assembled(plan).quantized
    inputs = _first_inputs(evaluator, min(evaluator.samples.count, FEW))
    return float_gains(quantized, inputs, seed=evaluator.seed)


def read_sensitivity(
    folder: Path, fingerprint: str | None = None, *, exact: bool = False
) -> Sensitivity | None:
    """The analysis in a run directory.

    Args:
        folder: The run directory.
        fingerprint: Of the records; None: whatever it was made of.
        exact: Only one that measured every layer will do.

    Returns:
        None where there is none, or it is of something else.
    """
    path = folder / "sensitivity.json"
    if not path.exists():
        return None
    try:
        stored = read_json(path)
        if fingerprint is not None and stored.get("fingerprint") != fingerprint:
            return None
        if exact and not stored["exact"]:
            return None
        known = {f.name for f in fields(Layer)}
        layers = [checked(Layer, _boundless(row, known)) for row in stored["layers"]]
        names = ("target", "metric", "higher_is_better", "samples", "engine")
        return Sensitivity(
            **{key: stored[key] for key in names},
            baseline=checked(Baseline, {k: _frozen(v) for k, v in stored["baseline"].items()}),
            layers=tuple(layers),
            layer_samples=stored.get("layer_samples", stored["samples"]),
            values=tuple(_values(stored)),
            remarks=tuple(remarks(stored)),
            whole=stored.get("simulated_baseline", {}).get("damage"),
        )
    except (RunError, KeyError, TypeError, AttributeError, ValueError) as cause:
        log.warning("%s: not readable, so that run and analyze make it anew: %s", path, cause)
        return None


def _ends(gm: fx.GraphModule) -> set[str]:
    """Names of the values from which an output is computed without a layer in between."""
    weighted = set(layers(gm))
    found = {n for n in gm.graph.nodes if n.op == "output"}
    for node in reversed(gm.graph.nodes):
        if any(u in found and u not in weighted for u in node.users):
            found.add(node)
    return {n.name for n in found}


def _first_inputs(evaluator: RewriteEvaluator, count: int) -> Tensor:
    if evaluator.samples.inputs is not None:
        return evaluator.samples.inputs[:count]
    size = 32
    found = list(itertools.islice(evaluator.samples.batches(size), -(-count // size)))
    return torch.cat(found)[:count]


def _per_sample(evaluator: RewriteEvaluator) -> Callable[[list[Tensor], Any], Tensor] | None:
    """Each sample's contribution to the metric; None where the metric is no mean."""
    task = evaluator.task
    outputs = [o[:1] for o in evaluator.reference()]
    targets: Any = evaluator.samples.targets
    if task.per_sample(outputs, targets[:1]) is None:
        return None

    def values(outputs: list[Tensor], targets: Any) -> Tensor:
        found = task.per_sample(outputs, targets)
        assert found is not None
        return found

    return values


def _boundless(row: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """The fields of a layer; JSON has no infinity, which a damage may be, and says null."""
    kept = {key: _frozen(value) for key, value in row.items() if key in known}
    return {**kept, "damage": math.inf} if kept.get("damage") is None else kept


def _values(stored: dict[str, Any]) -> list[Value]:
    rows = [v for v in stored.get("values", ()) if v["damage"] is not None]
    return [Value(v["value"], v["layer"], tuple(v["feeds"]), float(v["damage"])) for v in rows]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
