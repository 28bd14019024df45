"""Write and run an int8 file before anything else is done with a network: what cannot ship is said at once."""

from __future__ import annotations

from torch import Tensor, fx

from rewriter import QuantizeError
from rewriter.graph import copy_graph
from rewriter.int8 import QuantScheme, quantize
from rewriter.int8.onnx import Session, to_onnx
from search.config.schema import ConfigError

WAY_OUT = "engine: simulate scores the network without a file"


def try_file(gm: fx.GraphModule, scheme: QuantScheme, images: Tensor) -> None:
    """Quantize a copy on a few images, write its file, and run it on one and on all of them.

    Args:
        gm: canonical graph of the float network.
        scheme: the target.
        images: (N, C, H, W), at least one.

    Raises:
        ConfigError: a part cannot be written, or the runtime refuses the file.
    """
    quantized = quantize(copy_graph(gm), scheme, [images])
    try:
        file = to_onnx(quantized)
    except QuantizeError as cause:
        raise ConfigError(f"model: no int8 file: {cause}; {WAY_OUT}") from cause
    try:
        session = Session(file, threads=1)
        session.run(images[:1])
        session.run(images)
    except Exception as cause:  # each kind of fault has a class of its own there
        text = " ".join(str(cause).split())[:200]
        raise ConfigError(
            f"model: ONNX Runtime refuses the int8 file: {text}; {WAY_OUT}"
        ) from cause
