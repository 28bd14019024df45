"""What the file of plain int8 does, before anything is searched."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from rewriter import QuantizeError
from rewriter.graph import copy_graph
from rewriter.int8 import QuantScheme, quantize
from rewriter.int8.onnx import ReadBack
from search.config.schema import ConfigError
from search.engines import Engine, read_back

SAMPLES = 8
WAY_OUT = "engine: simulate scores the network without a file"


def trial(
    gm: fx.GraphModule, scheme: QuantScheme, calibration: Sequence[Tensor], engine: Engine
) -> ReadBack:
    """Emit the network as it is in int8, run it on one input and on several, and read back what it does.

    Ranges are those of a few inputs: which operations find an int8 kernel does not depend on more.

    Args:
        gm: canonical graph of the float network; a copy is quantized.
        scheme: the target.
        calibration: batches of inputs (N, ...), at least one.
        engine: what the file is for.

    Raises:
        ConfigError: a part cannot be written, or the runtime refuses the file.
    """
    batch = calibration[0][:SAMPLES]
    quantized = quantize(copy_graph(gm), scheme, [batch])
    try:
        model = engine.emit(quantized)
    except QuantizeError as cause:
        raise ConfigError(f"model: no int8 file: {cause}; {WAY_OUT}") from cause
    try:
        session = engine.open(model, 1, "cpu")
        for few in (batch[:1], batch[:3]):
            session.run(few)
    except Exception as cause:  # each kind of fault has a class of its own in a runtime
        text = " ".join(str(cause).split())[:200]
        raise ConfigError(
            f"model: {engine.name} refuses the int8 file: {text}; {WAY_OUT}"
        ) from cause
    return read_back(engine, quantized, model)
