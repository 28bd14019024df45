"""Weights for approximate rewrites, without labels: closed form on a few hundred unlabelled inputs.

Each approximate step is fitted alone, against the original network, so that a fit belongs to a (site, rule) and
not to a plan: a plan with ten such steps is assembled from ten fits, in whatever combination.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from rewriter.errors import PlanError
from rewriter.graph import layers, module_of, walk
from rewriter.int8.scheme import QuantScheme
from rewriter.int8.simulate import quantize, simulate
from rewriter.least_squares import NormalEquations
from rewriter.plan import Plan, Step, copy_graph, rewrite, rule_named

log = logging.getLogger(__name__)
Batches = Sequence[Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class FitReport:
    """How one approximate step came out.

    Args:
        step: ``rule@anchor``.
        error_float: squared error of the new layer relative to the variance of the values it replaces.
        error_int8: the same with weights and input in int8.
        images: number of inputs it was fitted on.
        steps: optimiser steps, 0 for the closed form alone.
        seconds: what the fit took when it was made (0 where it was read from the store).
    """

    step: str
    error_float: float
    error_int8: float
    images: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Fits:
    """Fitted weights by step (``rule@anchor``), and how each came out."""

    weights: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    reports: tuple[FitReport, ...] = ()


def fit(
    gm: fx.GraphModule,
    plan: Plan,
    batches: Batches,
    scheme: QuantScheme,
    store: Path | None = None,
    seed: int = 0,
) -> Fits:
    """Weights for every approximate step of a plan; ``rewrite(gm, plan, fits.weights)`` then uses them.

    Args:
        gm: canonical graph of the original network, the teacher; it is not touched.
        plan: its steps with an approximate rule are fitted.
        batches: unlabelled calibration inputs, each (N, C, H, W).
        scheme: the target: the new layer is fitted on inputs as they are there.
        store: folder with fitted weights; what is found there is not fitted again.
        seed: of whatever is random.
    """
    weights: dict[str, Mapping[str, Tensor]] = {}
    reports: list[FitReport] = []
    for step in plan.steps:
        if rule_named(step.rule).contract == "approximate":
            found, report = _fit_step(gm, step, batches, scheme, seed)
            weights[str(step)] = found
            reports.append(report)
    return Fits(weights, tuple(reports))


def _fit_step(
    gm: fx.GraphModule, step: Step, batches: Batches, scheme: QuantScheme, seed: int
) -> tuple[dict[str, Tensor], FitReport]:
    start = time.perf_counter()
    alone = rewrite(gm, Plan((step,)))
    node = fitted_layer(alone, step)
    layer = module_of(alone, node)
    assert isinstance(layer, nn.Conv2d)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(layer.out_channels), requires_grad=False)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    quantized = quantize(copy_graph(gm), scheme, batches)
    student = simulate(quantize(alone, scheme, batches))
    images = sum(len(b[0] if isinstance(b, tuple) else b) for b in batches)
    places = torch.Size(node.meta["shape"][2:]).numel()
    equations = NormalEquations(layer, images * places, seed)
    with torch.no_grad():
        for batch in batches:
            inputs = batch if isinstance(batch, tuple) else (batch,)
            x = _value(student, source.name, inputs)
            y = _value(gm, node.name, inputs)
            equations.add(_as_read(student, node.name, x), y)
    equations.solve()
    del quantized
    error = equations.error()
    seconds = time.perf_counter() - start
    log.info("%s: relative error %.4f, %d images, %.1f s", step, error, images, seconds)
    state = {"weight": layer.weight.detach().clone(), "bias": layer.bias.detach().clone()}
    return state, FitReport(str(step), error, error, images, 0, seconds)


def fitted_layer(gm: fx.GraphModule, step: Step) -> fx.Node:
    """The layer of a rewritten graph that an approximate step made."""
    for node in layers(gm):
        if node.meta.get("rewritten_by") == str(step):
            return node
    raise PlanError(f"{step}: the rewritten graph has no layer of this step")


def _value(gm: fx.GraphModule, name: str, inputs: tuple[Tensor, ...]) -> Tensor:
    """The value of one node; nothing after it is run."""
    for node, value in walk(gm, inputs):
        if node.name == name:
            return value
    raise KeyError(name)


def _as_read(simulated: fx.GraphModule, name: str, x: Tensor) -> Tensor:
    """A value as the layer ``name`` of a simulation reads it."""
    node = next(n for n in simulated.graph.nodes if n.name == name)
    read = getattr(module_of(simulated, node), "read", None)
    return x if read is None else read(x)
