"""Ship a plan: the int8 file, the float network as source and weights, and what changed."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import safetensors.torch
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rewriter import Plan, Quantized
from rewriter.assemble import Assembled
from rewriter.errors import RewriteError
from rewriter.export import Source, construct, source_of
from rewriter.fitting import FitReport
from rewriter.graph import facts, layer_name, layers, module_of
from rewriter.int8 import int8_values, isolated
from rewriter.int8.onnx import (
    Comparison,
    Finding,
    compare,
    first_departure,
)
from rewriter.plan import rule_named
from rewriter.storage import replacing
from search.engines import engine_named
from search.export.clock import on_the_clock, timed
from search.export.forms import Written, engine_of_target, write_form
from search.latency.clock import Clocked
from search.run_dir.files import write_json
from search.run_dir.scores import Score
from search.scoring.evaluator import RewriteEvaluator

COMPARED = 4  # inputs on which simulation and runtime are compared value by value
_SHOWN = {"onnxruntime": "ONNX Runtime", "litert": "LiteRT", "openvino": "OpenVINO"}
TOLERANCE = 1e-4  # of the largest output: another order of additions moves the last bits


@dataclass(frozen=True)
class Exported:
    """What was written, and what the int8 file measured."""

    folder: Path
    files: tuple[Path, ...]
    score: Score
    findings: tuple[Finding, ...] = ()
    departure: Comparison | None = None
    quantized: Quantized | None = None
    clocked: Clocked | None = None


def export(
    evaluator: RewriteEvaluator,
    plan: Plan,
    folder: Path,
    searched: Score | None = None,
    compared: bool = False,
) -> Exported:
    """Write a plan's network into a folder.

    ``model_int8.onnx`` (``.tflite`` for that target) is what ships; ``model.py`` and ``model.safetensors`` are the rewritten
    float network; ``ranges.json`` holds every scale; ``CHANGES.md`` says what changed and what
    exactly this file measured.

    Args:
        evaluator: Of the run.
        plan: What to export.
        folder: Made when missing; files of an earlier export are replaced.
        searched: The plan's score in the search, to compare with.
        compared: Also write ``comparison.json``: simulation and runtime, value by value.

    Raises:
        RewriteError: the plan cannot be carried out, or the written source does not compute what
            the graph does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assembled = evaluator.assembled(plan)
    quantized = assembled.quantized
    name = type(evaluator.gm).__name__
    title = f"{name} rewritten for int8 ({evaluator.scheme.name}): {plan or 'nothing changed'}"
    source = source_of(quantized.gm, name, title)
    _check(source, quantized.gm, evaluator.calibration[0][:2])

    files = [folder / n for n in ("model.py", "model.safetensors", "ranges.json", "CHANGES.md")]
    written = write_form(evaluator, quantized, engine_of_target(evaluator.scheme.name), folder)
    if written.file.suffix == ".onnx":
        onnx.checker.check_model(str(written.file))
    files[:0] = [written.file, written.card]
    findings = written.findings
    with replacing(files[2]) as file:
        file.write(source.text)
    with replacing(files[3], "wb") as file:
        file.write(safetensors.torch.save(dict(source.state)))
    write_json(files[4], ranges(quantized))
    found = written.score
    score = replace(
        evaluator(plan),
        metric=found.metric,
        interval=found.interval,
        original=found.original,
        damage=found.damage,
        samples=found.samples,
        engine=found.engine,
        engine_version=found.engine_version,
        latency_ms=written.latency_ms,
    )
    with replacing(files[5]) as file:
        file.write(changes(evaluator, plan, assembled, source, score, searched, written.file.name))
        file.write(linted(findings))
    times = on_the_clock(evaluator, written)
    if times is not None:
        files.append(folder / "latency.json")
        write_json(files[-1], times.to_dict())
        with open(files[5], "a", encoding="utf-8") as file:
            file.write(timed(times))
    if not compared:
        return Exported(folder, tuple(files), score, findings, None, quantized, times)
    rows = _compared(evaluator, quantized, written)
    files.append(folder / "comparison.json")
    # no difference at all is an infinite ratio, which JSON cannot hold
    values = [{**asdict(r), "sqnr_db": r.sqnr_db if r.differs else None} for r in rows]
    write_json(files[-1], {"format": 1, "samples": COMPARED, "values": values})
    departure = first_departure(rows, quantized)
    return Exported(folder, tuple(files), score, findings, departure, quantized, times)


def _compared(
    evaluator: RewriteEvaluator, quantized: Quantized, written: Written
) -> list[Comparison]:
    """Simulation and runtime, value by value: on the whole network, or each operation on the runtime's own inputs."""
    inputs = evaluator.calibration[0][:COMPARED]
    engine = engine_named(written.engine)
    if written.file.suffix == ".onnx":
        return compare(quantized, inputs, threads=evaluator.threads)
    names = int8_values(quantized)
    rows = isolated(quantized, inputs, engine.values(quantized, names, inputs), fixed_point=False)
    return [Comparison(r.node, r.layer, r.sqnr_db, r.differs, r.largest) for r in rows]


def linted(findings: Sequence[Finding]) -> str:
    """The section of ``CHANGES.md`` on what to know before deployment."""
    if not findings:
        return ""
    rows = [f"- `{f.code}` {f.node}: {f.message}" for f in findings]
    return "\n".join(["", "## Before deployment", "", *rows, ""])


def ranges(quantized: Quantized) -> dict[str, Any]:
    """Range, scale and zero point of every int8 value, and all weight scales, by node name."""
    values: dict[str, Any] = {}
    for node in quantized.gm.graph.nodes:
        note = facts.INT8.of(node)
        if note.output is None or note.range_of not in quantized.calibration.values:
            continue
        low, high = quantized.calibration.values[note.range_of]
        scale, zero_point = quantized.value_params(node)
        values[node.name] = {"low": low, "high": high, "scale": scale, "zero_point": zero_point}
        if note.output.bits != 8:
            values[node.name]["bits"] = note.output.bits
        if note.range_of != node.name:
            values[node.name]["range_of"] = note.range_of
    weights = {
        node.name: {
            "layer": layer_name(node),
            "scale": quantized.calibration.weights[node.name].flatten().tolist(),
        }
        for node in layers(quantized.gm)
        if node.name in quantized.calibration.weights
    }
    return {
        "format": 1,
        "target": quantized.scheme.name,
        "samples": quantized.calibration.samples,
        "values": values,
        "weights": weights,
    }


def changes(
    evaluator: RewriteEvaluator,
    plan: Plan,
    assembled: Assembled,
    source: Source,
    score: Score,
    searched: Score | None,
    name: str = "model_int8.onnx",
) -> str:
    """The text of ``CHANGES.md``."""
    gm = assembled.quantized.gm
    base = evaluator.baseline()
    lines = [f"# {source.class_name} for {evaluator.scheme.name}", "", "## Steps", ""]
    lines += [_said(step.rule, step.anchor, assembled.fits) for step in plan.steps] or [
        "Nothing was changed."
    ]
    if evaluator.maker is not None:
        lines += ["", "All weights were then trained end to end (fine-tuned, or given as a file)."]
    lines += ["", "## Layers", "", *_difference(evaluator.gm, gm), "", "## Measured", ""]
    lines += [
        f"`{name}`, this file, on {_SHOWN.get(score.engine, score.engine)} with {score.samples} samples:",
        "",
        "| | MACs | " + evaluator.task.metric + " | 95 % interval | damage |",
        "|---|---|---|---|---|",
        f"| float, as it was | {base.macs / 1e6:.2f} M | {_number(base.float)} | | 0 |",
        f"| int8, as it was | {base.macs / 1e6:.2f} M | {_number(base.int8)} "
        f"| {_interval(base.interval)} | {_number(base.damage)} |",
        f"| int8, this file | {score.macs / 1e6:.2f} M ({score.macs_ratio - 1:+.1%}) "
        f"| {_number(score.metric)} | {_interval(score.interval)} | {_number(score.damage)} |",
        "",
        "Intervals are paired with float on the same samples. "
        f"{score.float_layers} weighted layers are in float.",
        f"Weights: {score.weight_bytes / 1e6:.2f} MB; {score.params} parameters.",
    ]
    if searched is not None and searched.engine != score.engine:
        lines.append(
            f"The search scored this plan by {searched.engine}: {_number(searched.metric)}, "
            f"damage {_number(searched.damage)}."
        )
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from model import load",
        "",
        'model = load("model.safetensors")',
        "```",
        "",
    ]
    if source.opaque:
        lines += [
            f"These parts are your own modules, passed in by name: {', '.join(source.opaque)}.",
            "",
        ]
    return "\n".join(lines)


def _said(rule: str, anchor: str, fits: tuple[FitReport, ...]) -> str:
    found = rule_named(rule)
    summary = (type(found).__doc__ or rule).strip().splitlines()[0]
    report = next((f for f in fits if f.step == f"{rule}@{anchor}"), None)
    fitted = ""
    if report is not None:
        fitted = (
            f" Fitted on {report.images} images, {report.steps} steps: relative error "
            f"{report.error_float:.3g} in float, {report.error_int8:.3g} in int8."
        )
    return f"- `{rule}@{anchor}` ({found.contract}): {summary}{fitted}"


def _difference(before: fx.GraphModule, after: fx.GraphModule) -> list[str]:
    """Weighted layers that went, came or changed, as a diff."""
    old = {n.name: f"{n.name}: {construct(module_of(before, n))}" for n in layers(before)}
    new = {n.name: _shown(after, n) for n in layers(after)}
    gone = [
        f"- {text}"
        for name, text in old.items()
        if name not in new or not new[name].startswith(text)
    ]
    came = [f"+ {text}" for name, text in new.items() if text != old.get(name)]
    return ["```diff", *gone, *came, "```"] if gone or came else ["All layers are as they were."]


def _shown(gm: fx.GraphModule, node: fx.Node) -> str:
    made = facts.REWRITTEN_BY.get(node)
    where = "  (in float)" if facts.KEEP_FLOAT.get(node) else f"  ({made})" if made else ""
    return f"{node.name}: {construct(module_of(gm, node))}{where}"


def _check(source: Source, gm: fx.GraphModule, example: Tensor) -> None:
    """Run the written source and compare: a file that computes something else must not leave."""
    module = types.ModuleType("exported")
    exec(compile(source.text, "model.py", "exec"), module.__dict__)
    if source.opaque:
        return  # it cannot be built without the user's own modules
    model = getattr(module, source.class_name)()
    model.load_state_dict(dict(source.state))
    with torch.no_grad():
        found, expected = (pytree.tree_leaves(m.eval()(example)) for m in (model, gm))
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if isinstance(b, Tensor) and b.is_floating_point():
            error, size = float((a - b).abs().max()), float(b.abs().max()) or 1.0
            if not error <= TOLERANCE * size:
                raise RewriteError(
                    f"model.py: output {i} differs from the graph's by {error:.3g} of {size:.3g}"
                )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.4g} to {bounds[1]:.4g}"
