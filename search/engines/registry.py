"""The engines, best first, and which of them scores a run."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Sequence

from torch import Tensor, fx

from rewriter import QuantizeError, quantize
from rewriter.graph import copy_graph
from rewriter.int8 import QuantScheme
from search.engines.engine import Engine
from search.engines.litert import LiteRT
from search.engines.onnxruntime import OnnxRuntime
from search.engines.openvino import OpenVINO
from search.engines.simulation import Simulation
from search.engines.tensorrt import TensorRT

log = logging.getLogger(__name__)

ENGINES: list[Engine] = [
    LiteRT(),
    OnnxRuntime(),
    OpenVINO(),
    TensorRT(),
    Simulation(),
]


class EngineError(ValueError):
    """No engine that was asked for can run the target."""


def engine_named(name: str) -> Engine:
    """The engine called ``name``.

    Raises:
        EngineError: there is none; the message names the nearest.
    """
    for engine in ENGINES:
        if engine.name == name:
            return engine
    known = [e.name for e in ENGINES]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise EngineError(f"engine: unknown: {name!r}{hint} (known: {', '.join(known)})")


def takes(engine: Engine, target: str) -> bool:
    """Whether an engine can run networks quantized for a target."""
    return engine.takes is None or target in engine.takes


def check_engines(names: Sequence[str], target: str) -> None:
    """Check that every name is that of an engine that runs a target.

    Raises:
        EngineError: one is not.
    """
    for engine in map(engine_named, names):
        if not takes(engine, target):
            can = ", ".join(sorted(engine.takes or ()))
            raise EngineError(f"engine: {engine.name} does not run target {target} (runs: {can})")


def refusal(engine: Engine, gm: fx.GraphModule, scheme: QuantScheme, x: Tensor) -> str:
    """Why an engine cannot write a network; "" where it can. It is tried, on one input.

    Args:
        engine: Any.
        gm: Canonical graph; it is not touched.
        scheme: The target.
        x: (n, ...) a few inputs.
    """
    try:
        engine.emit(quantize(copy_graph(gm), scheme, [x]))
    except QuantizeError as cause:
        return str(cause)
    return ""


def scoring_engine(
    target: str,
    wanted: Sequence[str] = (),
    refuses: Callable[[Engine], str] = lambda engine: "",
) -> Engine:
    """What scores the candidates of a target: the first that can run here.

    Args:
        target: The int8 target.
        wanted: Names, best first; empty: those that score the target by default.
        refuses: Why an engine cannot run this network; asked where there is another one to take.

    Raises:
        EngineError: a name is unknown, or none can run here.
    """
    if wanted:
        asked = [engine_named(name) for name in wanted]
    else:
        asked = [e for e in ENGINES if target in e.scores] or [engine_named("simulate")]
    return _first_that_runs(asked, target, refuses)


def _first_that_runs(
    asked: Sequence[Engine], target: str, refuses: Callable[[Engine], str]
) -> Engine:
    reasons: list[str] = []
    for engine in asked:
        reason = engine.missing()
        if not reason and engine is not asked[-1]:
            reason = refuses(engine)
        if not reason:
            if reasons:
                log.warning("%s: scored by %s instead", "; ".join(reasons), engine.name)
            return engine
        reasons.append(f"engine {engine.name}: {reason}")
    raise EngineError(f"target {target}: {'; '.join(reasons)}")


def shipping_engines(target: str) -> list[Engine]:
    """The engines that networks of a target are deployed on, and that can run here."""
    return [e for e in ENGINES if target in e.ships and not e.missing()]


def engines_of_form(form: str) -> list[Engine]:
    """The engines whose files ``export --to`` calls so."""
    return [e for e in ENGINES if e.form == form]


def forms() -> list[str]:
    """All that ``export --to`` can write, in the order of the registry."""
    return list(dict.fromkeys(e.form for e in ENGINES if e.form))
