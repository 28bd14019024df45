"""Int8 files in the forms that runtimes take, each run as it was written, with a page that says how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rewriter import Plan, Quantized, target
from rewriter.int8 import Finding
from rewriter.storage import replacing
from search.engines import (
    Engine,
    EngineError,
    OnnxRuntime,
    engine_named,
    engines_of_form,
    forms,
    shipping_engines,
)
from search.export.model_card import model_card
from search.run_dir.files import write_json
from search.run_dir.scores import Score
from search.scoring.evaluator import RewriteEvaluator
from search.scoring.measure import latency


@dataclass(frozen=True)
class Written:
    """One int8 file and what it measured.

    Attributes:
        form: What ``--to`` calls it.
        file: Where it is; ``card`` is the page beside it.
        target: That it was quantized for.
        engine: What ran it: the runtime itself, or what stands in for one that cannot run here.
        runtime: The runtime that it is for.
        score: Metric and damage on all samples, against the float network.
        size: Bytes.
        latency_ms: Median for one input on this machine.
        findings: What to know before it is deployed.
    """

    form: str
    file: Path
    card: Path
    target: str
    engine: str
    runtime: str
    score: Score
    size: int
    latency_ms: float
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """One entry of ``files.json``."""
        score = self.score
        return {
            "file": self.file.name,
            "target": self.target,
            "runtime": self.runtime,
            "engine": self.engine,
            "engine_version": score.engine_version,
            "int8": score.metric,
            "int8_interval": None if score.interval is None else list(score.interval),
            "damage": score.damage,
            "samples": score.samples,
            "bytes": self.size,
            "latency_ms": self.latency_ms,
            "findings": [[f.code, f.node, f.message] for f in self.findings],
        }


def engine_of_target(name: str) -> Engine:
    """The engine whose file is exported for a target where nothing else is asked for."""
    return next(iter(shipping_engines(name)), OnnxRuntime())


def checked_forms(names: Sequence[str]) -> tuple[str, ...]:
    """Forms that were asked for, each once.

    Raises:
        EngineError: one is unknown, or what writes it is not installed.
    """
    for name in names:
        if name not in forms():
            known = ", ".join(forms())
            raise EngineError(f"export: --to: unknown form: {name!r} (known: {known})")
        reasons = [e.missing() for e in engines_of_form(name) if not e.stand_in]
        if reasons and all(reasons):
            raise EngineError(f"export: --to {name}: {reasons[0]}")
    return tuple(dict.fromkeys(names))


def export_forms(
    evaluator: RewriteEvaluator, plan: Plan, folder: Path, names: Sequence[str]
) -> list[Written]:
    """Write a plan's network in several forms, and ``files.json`` about them.

    A form whose runtime does not take the run's target is quantized for its own: the plan is carried out again.

    Raises:
        EngineError: a form is unknown or cannot be written here.
        RewriteError: the plan cannot be carried out for a target, or an operator cannot be written.
    """
    names = checked_forms(names)
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Quantized] = {}
    found: list[Written] = []
    for name in names:
        engine = engines_of_form(name)[0]
        own = evaluator.scheme.name
        wanted = own if engine.takes is None or own in engine.takes else engine.target
        if wanted not in made:
            other = (
                evaluator
                if wanted == own
                else replace(evaluator, scheme=target(wanted), maker=None)
            )
            made[wanted] = other.assembled(plan).quantized
        found.append(write_form(evaluator, made[wanted], engine, folder))
    write_json(folder / "files.json", {"format": 1, "files": {w.form: w.to_dict() for w in found}})
    return found


def write_form(
    evaluator: RewriteEvaluator, quantized: Quantized, engine: Engine, folder: Path
) -> Written:
    """Write one file, read it back, run it on all samples, and write the page beside it."""
    content = engine.emit(quantized)
    file = folder / engine.file
    with replacing(file, "wb") as stream:
        stream.write(content)
    content = file.read_bytes()
    findings = tuple(engine.lint(quantized, content))
    runs = engine_named(engine.stand_in) if engine.missing() and engine.stand_in else engine
    session = runs.open(content, evaluator.threads, evaluator.device)
    parts = [session.run(x) for x in evaluator.samples.batches()]
    outputs = [torch.cat(column) for column in zip(*parts, strict=True)]
    score, _ = evaluator.measured.compare(outputs, (0, evaluator.samples.count))
    score = replace(score, engine=runs.name, engine_version=runs.version())
    (x,) = evaluator.samples.batches(1, 0, 1)
    written = Written(
        form=engine.form,
        file=file,
        card=folder / f"{engine.file}.md",
        target=quantized.scheme.name,
        engine=runs.name,
        runtime=engine.name,
        score=score,
        size=len(content),
        latency_ms=latency(session.run, x),
        findings=findings,
    )
    with replacing(written.card) as stream:
        stream.write(model_card(evaluator, quantized, engine, written))
    return written
