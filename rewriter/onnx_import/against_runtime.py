"""An imported network must compute what ONNX Runtime computes of its file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from rewriter.errors import TraceError

# Largest difference of an output from ONNX Runtime's, relative to its largest value.
TOLERANCE = 1e-3
# What float32 itself leaves of a probability.
LEAST_ERROR = 1e-6
CHECKED_INPUTS = 3
# How many times its own rounding an output of a network that amplifies rounding may be off.
ROUNDING = 4.0


def compare(
    network: nn.Module,
    model: onnx.ModelProto,
    shapes: Mapping[str, tuple[int | None, ...]],
    name: str,
) -> None:
    """Run several inputs as one batch in torch and, as the file allows, in ONNX Runtime."""
    random = np.random.default_rng(1)
    feed = {
        n: random.standard_normal((CHECKED_INPUTS, *[int(d or 0) for d in s[1:]])).astype(
            np.float32
        )
        for n, s in shapes.items()
    }
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = {i.name: i.type for i in session.get_inputs()}
    feed = {
        n: x.astype(np.float64 if kinds[n] == "tensor(double)" else np.float32)
        for n, x in feed.items()
    }
    fixed = next((s[0] for s in shapes.values() if s[0] is not None), None)
    if fixed not in (None, 1):
        feed = {n: np.concatenate([x] * fixed)[:fixed] for n, x in feed.items()}
    parts = (
        [
            session.run(None, {n: x[i : i + 1] for n, x in feed.items()})
            for i in range(CHECKED_INPUTS)
        ]
        if fixed == 1
        else [session.run(None, feed)]
    )
    with torch.no_grad():
        try:
            made = network(*[torch.from_numpy(x).float() for x in feed.values()])
        except Exception as error:
            raise TraceError(
                f"onnx: {name}: the imported network does not run on a batch of {CHECKED_INPUTS}: {error}"
            ) from error
    made = made if isinstance(made, tuple) else (made,)
    exact: list[Any] = []

    def rounding(i: int) -> float:
        """How far float32 takes an output from what float64 computes; 0 where that cannot be computed."""
        if not exact:
            double = copy.deepcopy(network).double()
            with torch.no_grad():
                try:
                    values = double(*[torch.from_numpy(x).double() for x in feed.values()])
                except RuntimeError:
                    values = made
            exact.append(values if isinstance(values, tuple) else (values,))
        return float((exact[0][i].double() - made[i].double()).abs().max())

    for i, found in enumerate(made):
        wanted = [torch.from_numpy(np.asarray(p[i])) for p in parts]
        expected = torch.cat(wanted, _joined(wanted[0], found)) if len(wanted) > 1 else wanted[0]
        if tuple(expected.shape) != tuple(found.shape):
            raise TraceError(
                f"onnx: {name}: output {i} has shape {tuple(found.shape)}, in ONNX Runtime {tuple(expected.shape)}"
            )
        size = float(expected.double().abs().max())
        error = float((expected.double() - found.double()).abs().max())
        if not error <= TOLERANCE * size + LEAST_ERROR and not error <= ROUNDING * rounding(i):
            raise TraceError(
                f"onnx: {name}: output {i} differs from ONNX Runtime's by {error:.2g}, its largest value is {size:.2g}"
            )


def _joined(one: Tensor, whole: Tensor) -> int:
    """The axis along which outputs of single inputs become that of a batch."""
    differs = [i for i, (a, b) in enumerate(zip(one.shape, whole.shape, strict=False)) if a != b]
    return differs[0] if differs else 0
