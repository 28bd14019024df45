"""A dense layer that reads hidden channels: rows of what it reads, its weights, and what int8 adds to it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.fitting.brain_surgeon import Moments, Problem, Rounding
from rewriter.fitting.least_squares import unfold
from rewriter.graph import facts
from rewriter.graph.lookup import is_call, module_of
from rewriter.graph.ops import ACTIVATION_TYPES
from rewriter.int8.scheme import QuantScheme
from rewriter.rules.thin_channels import channels_of_units
from rewriter.surgery.hidden_channels import Hidden

# Rows of what a reader reads: at least so many, and so many for each of its inputs.
ROWS, ROWS_EACH = 12_000, 4


def rows_of(
    layer: nn.Module, x: Tensor, y: Tensor | None, images: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Some rows of what a dense layer reads (n, K), and of values behind it (n, O).

    Args:
        layer: Convolution or linear layer.
        x: Its input for a few of the images.
        y: Values of its output's shape.
        images: How many there are in all.
        generator: Of the positions.
    """
    inputs = layer.weight[0].numel()  # type: ignore[index]
    most = -(-max(ROWS, ROWS_EACH * inputs) // max(1, images))  # of each image
    if isinstance(layer, nn.Linear):
        x = x.reshape(len(x), -1, x.shape[-1])
        t = None if y is None else y.reshape(len(y), -1, y.shape[-1])
        at = _positions(x.shape[1], most, generator, x.device)
        return x[:, at].flatten(0, 1), None if t is None else t[:, at].flatten(0, 1)
    assert isinstance(layer, nn.Conv2d)
    rows: list[Tensor] = []
    at = None
    for one in x.split(1 if inputs > 64 * x.shape[1] or x[0].numel() > 2**18 else 4):
        patches = unfold(layer, one)  # (n, K, places)
        if at is None:
            at = _positions(patches.shape[2], most, generator, x.device)
        rows.append(patches[:, :, at].transpose(1, 2).flatten(0, 1))
    assert at is not None
    t = None if y is None else y.flatten(2)[:, :, at].transpose(1, 2).flatten(0, 1)
    return torch.cat(rows), t


def _positions(count: int, most: int, generator: torch.Generator, device: torch.device) -> Tensor:
    if count <= most:
        return torch.arange(count, device=device)
    # drawn on the CPU, so that every device looks at the same
    return torch.randperm(count, generator=generator)[:most].sort().values.to(device)


def weights_of(layer: nn.Module) -> Tensor:
    """(K + 1, O) of a dense layer, the bias last, float64."""
    weight: Any = layer.weight
    w = weight.detach().double().flatten(1).T
    bias: Any = layer.bias
    b = torch.zeros_like(w[:1]) if bias is None else bias.detach().double()[None]
    return torch.cat([w, b])


def set_weights(layer: nn.Module, w: Tensor) -> None:
    """Put weights of this form into a layer, in place; it gets a bias where it has none."""
    weight: Any = layer.weight
    new = w[:-1].T.reshape(weight.shape).to(weight.dtype)
    layer.weight = nn.Parameter(new.contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(w[-1].to(weight.dtype).clone(), requires_grad=False)


def influence_of(reader: fx.Node, original: fx.Node | None, outputs: int) -> Tensor:
    """(O,) what a squared error in each output of a reader counts, 1 on average."""
    for node in (reader, original):
        known = None if node is None else facts.INFLUENCE.get(node)
        if isinstance(known, Tensor) and len(known) == outputs and float(known.sum()) > 0:
            return (known / known.mean()).clamp_min(1e-3)
    return torch.ones(outputs, dtype=torch.float64)


def problem_of(
    gm: fx.GraphModule, hidden: Hidden, moments: Moments, scheme: QuantScheme, weight: Tensor
) -> Problem:
    """What is to be decided at a site."""
    assert hidden.reader is not None
    layer = module_of(gm, hidden.reader)
    taps = layer.weight[0].numel() // layer.weight.shape[1]
    return Problem(
        moments,
        weights_of(layer),
        hidden.offset * taps,
        hidden.channels // hidden.unit,
        taps * hidden.unit,
        weight,
        list(roundings_of(gm, hidden, scheme)),
    )


def thinned_problem(problem: Problem, moments: Moments, start: Tensor, units: Tensor) -> Problem:
    """A problem of which only some units are left, on what the layer reads now."""
    return Problem(
        moments,
        start,
        problem.first,
        len(units),
        problem.block,
        problem.weight,
        [
            Rounding(r.low[units], r.high[units], r.gain[units], r.levels)
            for r in problem.roundings
        ],
    )


def input_rows(layer: nn.Module, columns: Tensor) -> Tensor:
    """Rows of a layer's weights (K + 1, O) that belong to some of its input channels, and the bias."""
    weight: Any = layer.weight
    taps = weight[0].numel() // weight.shape[1]
    rows = channels_of_units(columns, taps)
    return torch.cat([rows, torch.tensor([-1])])


def roundings_of(gm: fx.GraphModule, hidden: Hidden, scheme: QuantScheme) -> Iterator[Rounding]:
    """What int8 adds to each value of a site, by unit; nothing where ranges are not known."""
    gain = torch.ones(hidden.channels, dtype=torch.float64)
    levels = scheme.activations.qmax - scheme.activations.qmin
    for node in reversed(hidden.values()):
        users = list(node.users)
        fused = len(users) == 1 and is_call(gm, users[0], *ACTIVATION_TYPES)
        known = facts.CHANNEL_RANGE.get(node)
        if known is not None and not fused and len(known[0]) == hidden.channels:
            low, high = (r.double().view(-1, hidden.unit) for r in known)
            mean = gain.view(-1, hidden.unit).mean(1)
            yield Rounding(low.amin(1), high.amax(1), mean, levels)
        if is_call(gm, node, nn.Conv2d) and node is not hidden.entry:
            m = module_of(gm, node)
            if m.groups == m.in_channels == hidden.channels:
                gain = gain * m.weight.detach().double().square().sum((1, 2, 3)).cpu()
        if hidden.gates and node.target is operator.mul:
            return  # what a gate makes of errors is not known
