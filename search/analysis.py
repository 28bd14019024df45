"""Which layers int8 breaks, why, and which rules answer them: what ``quantfix analyze`` does."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from rewriter import Quantized, find_sites, quantize
from rewriter.cost import layer_macs
from rewriter.graph import kind_of, layer_name, layers, module_of
from rewriter.plan import copy_graph
from rewriter.rules import Site
from rewriter.sensitivity.exact import Block, batch_size, measure
from rewriter.sensitivity.forks import Forks, only
from rewriter.sensitivity.objective import Objective
from search.evaluator import RewriteEvaluator, Tick
from search.records import Baseline, RunError, read_json, write_json

log = logging.getLogger(__name__)

LARGEST = 1000  # samples: the order of the layers is settled long before
SPREAD = 8.0  # a channel with an eighth of the range has three of the eight bits less


@dataclass(frozen=True)
class LayerDamage:
    """What int8 does to the network when this layer alone is quantized.

    Attributes:
        layer: The module's qualified name; ``node`` is its name in the graph, which plans use.
        damage: Fidelity damage, lower is better.
        metric: Metric of the network with this layer in int8; ``drop`` against float. None where not measured.
        sqnr_db: Signal to quantization noise at the network's output.
        causes: What in the layer is hard for int8.
        answers: Steps that act here.
    """

    layer: str
    node: str
    kind: str
    macs: int
    damage: float
    metric: float | None
    drop: float | None
    sqnr_db: float | None
    causes: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The layers of a network, most harmful first, and the baseline that they are compared with."""

    target: str
    metric: str
    higher_is_better: bool
    samples: int
    engine: str
    baseline: Baseline
    layers: tuple[LayerDamage, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


def analyze(evaluator: RewriteEvaluator, tick: Tick = lambda done, total: None) -> Sensitivity:
    """Quantize one layer at a time, exactly, and rank the layers by the damage to the network's output."""
    gm = copy_graph(evaluator.gm)
    method = gm.meta.get("calibration", "minmax")
    quantized = quantize(gm, evaluator.scheme, evaluator.calibration, method)
    forks = Forks(quantized)
    objective = Objective.of([o[:64] for o in evaluator.reference()])
    variants = {node.name: only(gm, node) for node in layers(gm)}
    blocks: dict[str, list[Block]] = {name: [] for name in variants}
    targets = evaluator.samples.targets
    metric = _per_sample(evaluator) if targets is not None else None
    done, total = 0, min(evaluator.samples.count, LARGEST)
    for x in evaluator.samples.batches(batch_size(forks)):
        x = x[: total - done]
        here = None if targets is None else list(targets[done : done + len(x)])
        for name, block in measure(forks, objective, x, here, {}, variants, metric):
            if name:
                blocks[name].append(block)
        done += len(x)
        tick(done, total)
        if done >= total:
            break
    baseline = evaluator.baseline()
    reference = _float_metric(evaluator, done)
    macs, sites = layer_macs(gm), find_sites(gm)
    found = [
        _layer(quantized, node, blocks[node.name], reference, macs, sites, evaluator.task.higher_is_better)
        for node in layers(gm)
    ]
    return Sensitivity(
        target=evaluator.scheme.name,
        metric=evaluator.task.metric,
        higher_is_better=evaluator.task.higher_is_better,
        samples=done,
        engine="simulate",
        baseline=baseline,
        layers=tuple(sorted(found, key=lambda d: -d.damage)),
    )


def write_sensitivity(folder: Path, sensitivity: Sensitivity, fingerprint: str) -> None:
    """Write ``sensitivity.json``."""
    write_json(folder / "sensitivity.json", {**sensitivity.to_dict(), "fingerprint": fingerprint})


def read_sensitivity(folder: Path, fingerprint: str | None = None) -> Sensitivity | None:
    """The analysis in a run directory; None where there is none, or it was of something else."""
    path = folder / "sensitivity.json"
    if not path.exists():
        return None
    try:
        stored = read_json(path)
        if fingerprint is not None and stored.get("fingerprint") != fingerprint:
            return None
        rows = [
            LayerDamage(**{**row, "causes": tuple(row["causes"]), "answers": tuple(row["answers"])})
            for row in stored["layers"]
        ]
        return Sensitivity(
            **{key: stored[key] for key in ("target", "metric", "higher_is_better", "samples", "engine")},
            baseline=Baseline(**stored["baseline"]),
            layers=tuple(rows),
        )
    except (RunError, KeyError, TypeError) as cause:
        log.warning("%s: not readable, analysed again: %s", path, cause)
        return None


def causes(quantized: Quantized, node: fx.Node) -> tuple[str, ...]:
    """What in a layer's weights and values is hard for int8, from their ranges alone."""
    gm, found = quantized.gm, list[str]()
    note = node.meta["int8"]
    weight: Tensor = module_of(gm, node).weight.detach()
    rows = weight.flatten(1).abs().amax(1)
    if note.weight is not None and note.weight.ch_axis is None and _spread(rows) > SPREAD:
        found.append("weight_channel_spread")
    (source,) = node.all_input_nodes[:1]
    for name, value in (("input", source), ("output", _made(node))):
        stats = quantized.calibration.stats.get(value.name)
        if stats is None or value.meta["int8"].output is None:
            continue
        width = stats.channel_high.clamp_min(0) - stats.channel_low.clamp_max(0)
        if _spread(width) > SPREAD:
            found.append(f"{name}_channel_spread")
        low, high = quantized.calibration.values[value.meta["int8"].range_of]
        if value.meta["int8"].range_of != value.name and high - low > 2 * float(width.max()):
            found.append(f"{name}_shared_range")
    return tuple(found)


def _layer(
    quantized: Quantized,
    node: fx.Node,
    blocks: Sequence[Block],
    reference: float | None,
    macs: Mapping[str, int],
    sites: Sequence[Site],
    higher_is_better: bool,
) -> LayerDamage:
    damage = _joined([b.damage for b in blocks])
    signal, noise = (sum(_joined([getattr(b, k) for b in blocks])) for k in ("signal", "noise"))
    measured = [b.metric for b in blocks if b.metric is not None]
    metric = sum(_joined(measured)) / len(damage) if len(measured) == len(blocks) else None
    drop = None
    if metric is not None and reference is not None:
        drop = reference - metric if higher_is_better else metric - reference
    here = [s for s in sites if not s.blocked and node.name in s.nodes]
    steps = [f"{s.rule}@{s.nodes[0]}" for s in here]
    return LayerDamage(
        layer=layer_name(node),
        node=node.name,
        kind=kind_of(quantized.gm, node),
        macs=macs[node.name],
        damage=sum(damage) / len(damage),
        metric=metric,
        drop=drop,
        sqnr_db=10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None,
        causes=causes(quantized, node),
        answers=tuple(sorted(steps, key=lambda s: s.startswith("keep_float@"))),
    )


def _per_sample(evaluator: RewriteEvaluator) -> Callable[[list[Tensor], list[object]], Tensor] | None:
    task = evaluator.task
    probe = task.per_sample([o[:1] for o in evaluator.reference()], evaluator.samples.targets[:1])
    if probe is None:
        return None

    def values(outputs: list[Tensor], targets: list[object]) -> Tensor:
        found = task.per_sample(outputs, targets)
        assert found is not None
        return found

    return values


def _float_metric(evaluator: RewriteEvaluator, count: int) -> float | None:
    samples = evaluator.float_metric()[1]
    return None if samples is None or samples.metric is None else float(samples.metric[:count].mean())


def _made(node: fx.Node) -> fx.Node:
    """The int8 value that a layer makes: its own, or that of the activation fused into it."""
    users = list(node.users)
    if node.meta["int8"].output is None and len(users) == 1 and users[0].op == "call_module":
        return users[0]
    return node


def _spread(width: Tensor) -> float:
    """How many times the range of a typical channel the widest channel has."""
    used = width[width > 0]
    return float(used.max() / used.median()) if len(used) > 1 else 1.0


def _joined(parts: Sequence[Sequence[float]]) -> list[float]:
    return [value for part in parts for value in part]


def damage_by_node(sensitivity: Sensitivity) -> dict[str, float]:
    """Damage of each layer alone, by the node name that plans use."""
    return {d.node: d.damage for d in sensitivity.layers}
