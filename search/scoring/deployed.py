"""Chosen plans on the engine that ships them, where that is not the one that scored them.

A search scores on what is fast; the numbers that count are those of the runtime that the network is deployed on. Where
the two disagree by more than the interval of the score, the operation that differs most on the runtime's own inputs is
named.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rewriter import Plan, Quantized, RewriteError
from rewriter.int8 import guilty, int8_values, isolated
from search.engines import ENGINES, Engine, shipping_engines
from search.run_dir.files import read_json, write_json
from search.run_dir.scores import Score
from search.scoring.evaluator import RewriteEvaluator

log = logging.getLogger(__name__)

FILE = "deployed.json"
# Without labels: damages further apart than this, relative to the larger, disagree.
APART = 0.25
INPUTS = 2  # on which operations are compared
SHARE = 0.05  # of the elements of a value that may differ by a step

Deployed = dict[str, dict[str, dict[str, Any]]]
"""By plan and engine: metric (``int8``), damage, version, and the guilty operation if they disagree."""


def read_deployed(folder: Path, fingerprint: str) -> Deployed:
    """What is known in a run directory."""
    file = folder / FILE
    if not file.exists():
        return {}
    known = read_json(file)
    return known["plans"] if known.get("fingerprint") == fingerprint else {}


def confirmed_on(score: Score, target: str, known: Deployed) -> dict[str, Any]:
    """``confirmed`` of a point in ``front.json``: what each engine that ships the target measured, on all samples."""
    found: dict[str, Any] = {}
    if score.engine in {e.name for e in ENGINES if target in e.ships}:
        found[score.engine] = {"int8": score.metric, "damage": score.damage}
    for engine, entry in known.get(score.plan, {}).items():
        found[engine] = {"int8": entry["int8"], "damage": entry["damage"]}
    return found


def score_deployed(evaluator: RewriteEvaluator, folder: Path, scores: Sequence[Score]) -> Deployed:
    """Run plans on the engines that ship their target, but for the one that scored them.

    Args:
        evaluator: Of the run.
        folder: The run directory, where the result is kept.
        scores: Of the plans on all samples.
    """
    known = read_deployed(folder, evaluator.records.fingerprint)
    engines = [e for e in shipping_engines(evaluator.scheme.name) if e.name != evaluator.engine]
    for score in scores if engines else ():
        entries = known.setdefault(score.plan, {})
        for engine in engines:
            if score.error is None and engine.name not in entries:
                entries[engine.name] = _entry(evaluator, engine, score)
    if engines:
        content = {"fingerprint": evaluator.records.fingerprint, "plans": known}
        write_json(folder / FILE, content)
    return known


def _entry(evaluator: RewriteEvaluator, engine: Engine, score: Score) -> dict[str, Any]:
    quantized = evaluator.assembled(Plan.parse(score.plan)).quantized
    try:
        session = engine.open(engine.emit(quantized), evaluator.threads, evaluator.device)
        parts = [session.run(x) for x in evaluator.samples.batches()]
    except (RewriteError, RuntimeError) as cause:
        log.warning("plan %r on %s: %s", score.plan, engine.name, cause)
        return {"int8": None, "damage": None, "version": engine.version(), "error": str(cause)}
    outputs = [torch.cat(column) for column in zip(*parts, strict=True)]
    found, _ = evaluator.measured.compare(outputs, (0, evaluator.samples.count))
    entry: dict[str, Any] = {
        "int8": found.metric,
        "damage": found.damage,
        "version": engine.version(),
    }
    if disagree(score, found):
        entry["guilty"] = _guilty(evaluator, engine, quantized)
        log.warning(
            "plan %r: %s gives %s, damage %s, where %s gave %s, damage %s; %s",
            *(score.plan, engine.name, found.metric, found.damage),
            *(evaluator.engine, score.metric, score.damage),
            entry["guilty"] or "no single operation differs by itself",
        )
    return entry


def disagree(score: Score, found: Score) -> bool:
    """Whether another engine's numbers of a plan are not those that it was chosen by."""
    if score.interval is not None and found.metric is not None:
        low, high = score.interval
        return not low <= found.metric <= high
    if score.damage is None or found.damage is None:
        return False
    return abs(score.damage - found.damage) > APART * max(score.damage, found.damage)


def _guilty(evaluator: RewriteEvaluator, engine: Engine, quantized: Quantized) -> str:
    names = int8_values(quantized)
    (x,) = evaluator.samples.batches(INPUTS, 0, INPUTS)
    rows = isolated(quantized, x, engine.values(quantized, names, x), fixed_point=False)
    worst = guilty(rows, SHARE)
    if worst is None:
        return ""
    return f"{worst.layer} ({worst.kind}): {worst.differs:.1%} of its values differ, by up to {worst.largest:.0f} steps"
