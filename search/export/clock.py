"""The exported file beside float and plain int8 on this machine's clock."""

from __future__ import annotations

from rewriter import Plan
from rewriter.int8.onnx import float_onnx
from search.engines import OnnxRuntime
from search.export.forms import Written
from search.latency.clock import CHOSEN, FLOAT, PLAIN, Clocked, clocked
from search.scoring.evaluator import RewriteEvaluator


def on_the_clock(evaluator: RewriteEvaluator, written: Written) -> Clocked | None:
    """Float, plain int8 and the written file, measured in turns; None where ONNX Runtime does not ship the target."""
    engine = OnnxRuntime()
    if written.engine != engine.name or written.target not in engine.ships:
        return None
    plain = (evaluator.plain or evaluator).assembled(Plan(())).quantized
    (x,) = evaluator.samples.batches(1, 0, 1)
    files = {
        FLOAT: float_onnx(evaluator.gm).SerializeToString(),
        PLAIN: engine.emit(plain),
        CHOSEN: written.file.read_bytes(),
    }
    return clocked(files, x, evaluator.threads)


def timed(found: Clocked) -> str:
    """The section of ``CHANGES.md`` on time."""
    rows = [
        f"| {name} | {t.one_ms:.3g} | {t.all_ms:.3g} | {t.bytes / 1e6:.2f} |"
        for name, t in found.times.items()
    ]
    return "\n".join(
        [
            "",
            "## Time for one input on this machine",
            "",
            f"| | ms, one thread | ms, {found.threads} threads | MB |",
            "|---|---|---|---|",
            *rows,
            "",
            found.verdict,
            "",
        ]
    )
