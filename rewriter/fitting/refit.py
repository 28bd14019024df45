"""Refit one layer on what it reads in a rewritten network, towards what it made in the original one.

Least squares on unfolded patches (``rewriter.fitting.least_squares``) from the inputs that fit; how far the weights are
pulled towards those the layer had, or whether its bias alone moves, is judged on the inputs held back.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from rewriter.fitting.least_squares import NormalEquations
from rewriter.fitting.side_by_side import Batches, values
from rewriter.graph import facts
from rewriter.graph.lookup import module_of
from rewriter.int8.integer_grid import dequantized_weight, fake_quantize
from rewriter.int8.scheme import QuantScheme, channel_axis, weight_scale

# A fitted reader is pulled towards its weights by one of these shares; None: its bias alone is fitted.
PULLS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Inputs of a reader beyond which the normal equations are too large.
WIDEST = 2400
HELD = 5
# Rows of a linear reader, at least, and for each of its inputs.
LINEAR_ROWS, ROWS_EACH = 8192, 4


def refit(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    reader: fx.Node,
    batches: Batches,
    scheme: QuantScheme,
    seed: int,
) -> tuple[float, float]:
    """Refit one reader, in place; its relative error, and that with rounded weights."""
    layer = module_of(student, reader)
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return 0.0, 0.0
    source = reader.args[0]
    assert isinstance(source, fx.Node)
    spec = scheme.activations
    ends = spec.params(*ends_of(student, source.name, batches))
    proxy = layer if isinstance(layer, nn.Conv2d) else _as_convolution(layer)
    size = proxy.weight[0].numel() + 1
    images = sum(len(b[0]) for b in batches)
    places = torch.Size(facts.SHAPE.of(reader)[2:]).numel() if proxy is layer else 1
    wide = size > WIDEST
    sets = [_Means() if wide else NormalEquations(proxy, images * places, seed) for _ in (0, 1)]
    drawn = torch.Generator().manual_seed(seed)
    at = 0
    for batch in batches:
        with torch.no_grad():
            (x,) = values(student, (source.name,), batch)
            (y,) = values(teacher, (reader.name,), batch)
            x = fake_quantize(x, *ends, spec)
            held = (torch.arange(at, at + len(x), device=x.device) % HELD) == 0
            at += len(x)
            for part, chosen in zip(sets, (~held, held), strict=True):
                if not chosen.any():
                    continue
                xs, ys = x[chosen], y[chosen]
                if proxy is not layer:
                    xs, ys = _as_rows(xs, ys, size, images, drawn)
                if isinstance(part, _Means):
                    part.add(proxy(xs), ys)
                else:
                    part.add(xs, ys)
    _solve(proxy, sets)
    errors = sets[0].error(), 0.0
    if not wide:
        exact = proxy.weight.detach().clone()
        kind = scheme.linear_weights if proxy is not layer else scheme.weights
        axis = channel_axis(proxy, kind)
        scales = weight_scale(exact, kind, axis)
        proxy.weight.data = dequantized_weight(exact, scales, kind, axis)
        errors = errors[0], sets[0].error()
        proxy.weight.data = exact
    if proxy is not layer:
        layer.weight.data = proxy.weight.detach()[:, :, 0, 0].clone()
        layer.bias.data = proxy.bias.detach().clone()  # type: ignore[union-attr]
    return errors


class _Means:
    """What a layer whose normal equations are too large gives on average, and what is wanted."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.squared = self.variance = 0.0
        self.rows = 0

    def add(self, given: Tensor, wanted: Tensor) -> None:
        missing = (wanted - given).double().transpose(0, 1).flatten(1)
        self.total = missing.sum(1) + (0 if self.total is None else self.total)
        self.rows += missing.shape[1]
        self.squared += float(missing.square().sum())
        self.variance += float((wanted - wanted.mean()).double().square().sum())

    def error(self) -> float:
        if self.total is None or not self.rows:
            return 0.0
        left = self.squared - float(self.total.square().sum()) / self.rows
        return max(left, 0.0) / max(self.variance, 1e-300)


def _solve(layer: nn.Conv2d, sets: list[NormalEquations | _Means]) -> None:
    """Put the weights into a layer that are best on inputs held back."""
    fitted, held = sets
    if isinstance(fitted, _Means) or isinstance(held, _Means):
        if isinstance(fitted, _Means) and fitted.total is not None:
            layer.bias.data += (fitted.total / fitted.rows).to(layer.weight)  # type: ignore[union-attr]
        return
    start = fitted.weights()
    judge = held if held.rows else fitted
    tried: list[tuple[float, int, Tensor]] = []
    for number, pull in enumerate((None, *PULLS)):
        fitted.set_weights(start)
        if pull is None:
            _mean_bias(fitted)
        else:
            fitted.solve(pull)
        tried.append((judge.error(), number, fitted.weights()))
    fitted.set_weights(min(tried, key=lambda t: t[:2])[2])


def _mean_bias(equations: NormalEquations) -> None:
    """Move the biases so that the mean of each output is right."""
    w = equations.weights()
    ones = equations.xx[:, -1]  # (groups, K), sums of what is read
    missing = equations.xy[:, -1] - (ones[:, None] @ w)[:, 0]
    w[:, -1] += missing / ones[:, -1:].clamp_min(1e-300)
    equations.set_weights(w)


def _as_convolution(layer: nn.Linear) -> nn.Conv2d:
    made = nn.Conv2d(layer.in_features, layer.out_features, 1).to(layer.weight)
    made.weight = nn.Parameter(layer.weight.detach()[:, :, None, None].clone(), False)
    made.bias = nn.Parameter(layer.bias.detach().clone(), False)
    return made


def _as_rows(
    x: Tensor, y: Tensor, size: int, images: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Some rows of what a linear layer reads and is to make, as pictures of one pixel."""
    most = -(-max(LINEAR_ROWS, ROWS_EACH * size) * len(x) // max(1, images))
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    if most < len(x):
        chosen = torch.randperm(len(x), generator=generator)[:most].to(x.device)
        x, y = x[chosen], y[chosen]
    return x[:, :, None, None], y[:, :, None, None]


def ends_of(gm: fx.GraphModule, name: str, batches: Batches) -> tuple[float, float]:
    """Least and largest value of a node on the inputs, zero included."""
    low, high = 0.0, 0.0
    for batch in batches:
        with torch.no_grad():
            (x,) = values(gm, (name,), batch)
        low, high = min(low, float(x.min())), max(high, float(x.max()))
    return low, high
