"""What the file of plain int8 does, before anything is searched."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from rewriter.graph import copy_graph
from rewriter.int8 import QuantScheme, quantize
from rewriter.int8.onnx import ReadBack
from search.engines import Engine, read_back

SAMPLES = 8


def trial(
    gm: fx.GraphModule, scheme: QuantScheme, calibration: Sequence[Tensor], engine: Engine
) -> ReadBack:
    """Emit the network as it is in int8, run it on one input and on several, and read back what it does.

    Ranges are those of a few inputs: which operations find an int8 kernel does not depend on more.

    Raises:
        QuantizeError: an operator cannot be written.
    """
    batch = calibration[0][:SAMPLES]
    quantized = quantize(copy_graph(gm), scheme, [batch])
    model = engine.emit(quantized)
    session = engine.open(model, 1, "cpu")
    for few in (batch[:1], batch[:3]):
        session.run(few)
    return read_back(engine, quantized, model)
