"""A traced graph must compute what the model does, also with a batch it was not traced with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rewriter.errors import TraceError
from rewriter.tracing.tracer import one_line

# Largest difference between the graph's output and the model's, relative to the largest output.
TOLERANCE = 1e-4
# How much further from the exact result the graph may be than the model itself, both in float32.
ROUNDING = 4.0


def batch_of(example: Tensor, size: int) -> Tensor:
    """(N, ...) repeated to ``size`` samples that differ from each other."""
    rows = example[torch.arange(size) % len(example)].clone()
    scale = torch.linspace(1.0, 0.5, size).view(-1, *[1] * (rows.ndim - 1))
    return rows * scale


def verify(model: nn.Module, gm: fx.GraphModule, examples: tuple[Tensor, ...]) -> None:
    """Compare a graph with its model on five inputs made of the examples.

    Raises:
        TraceError: the graph fails or gives something else; or the model is random, or not finite.
    """
    name = type(model).__name__
    batch = tuple(batch_of(e, 5) for e in examples)
    expected = _leaves(model, batch)
    try:
        found = _leaves(gm, batch)
    except Exception as cause:
        raise TraceError(
            f"{name}: the traced graph fails for a batch of 5: {one_line(cause)}; "
            "the forward depends on the batch size"
        ) from cause
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(a, Tensor):
            continue
        if a.is_floating_point() and not torch.isfinite(a).all():
            raise TraceError(f"model: output {i} of the float model holds NaN or infinite values")
        error, scale = _difference(a, b)
        if error <= TOLERANCE * scale:
            continue
        if any(
            _difference(x, y)[0] > 0 for x, y in zip(expected, _leaves(model, batch), strict=True)
        ):
            raise TraceError(f"{name}: output {i} is random: the same input gives another output")
        if _is_rounding(model, batch, list(zip(expected, found, strict=True))):
            continue
        raise TraceError(
            f"{name}: output {i} of the traced graph differs from the model's by {error:.2g} "
            f"(largest value {scale:.2g}); the forward depends on values of its input, or on "
            "what it computed before"
        )


def _leaves(m: nn.Module, batch: tuple[Tensor, ...]) -> list[Any]:
    """The flat outputs for a copy of a batch, since a model may overwrite its input."""
    with torch.no_grad():
        return pytree.tree_leaves(m(*[b.clone() for b in batch]))


def _is_rounding(model: nn.Module, batch: tuple[Tensor, ...], pairs: list[Any]) -> bool:
    """Whether the graph is as near to the model in float64 as the model in float32 is itself.

    Some networks amplify what float32 rounds away, and then folding a batch norm already shows.
    """
    inputs = tuple(b.double() if b.is_floating_point() else b for b in batch)
    try:
        exact = _leaves(copy.deepcopy(model).double(), inputs)
    except RuntimeError:  # a part that wants float32: there is nothing to compare with
        return False
    return all(
        _difference(e, found)[0] <= ROUNDING * _difference(e, own)[0]
        for e, (own, found) in zip(exact, pairs, strict=True)
        if _difference(own, found)[0] > TOLERANCE * _difference(own, found)[1]
    )


def _difference(a: Any, b: Any) -> tuple[float, float]:
    """Largest difference of two outputs, and the largest value of the first."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0, 1.0
    if a.shape != b.shape:
        return float("inf"), 1.0
    a, b = a.double(), b.double()
    return float((a - b).abs().max()) if a.numel() else 0.0, float(a.abs().max()) or 1.0
