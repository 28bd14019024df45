"""How much an error in a value or a weight matters to the output: diagonal Fisher information, from a few images.

The float network is the least of the damage, so a small error d at some place costs damage ~ 1/2 E[(g . d)^2] with g the
gradient there of a random projection of the outputs (``Fidelity.probe``). Rounding errors are independent
from value to value, so sums of g^2 are enough, and they carry over to a rescaled channel by a factor.
Source: Martens, 2014 (arXiv:1412.1193).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.damage.fidelity import Fidelity
from rewriter.damage.grouping import fidelity_of
from rewriter.graph import facts
from rewriter.graph.axes import batch_axes, channel_axes
from rewriter.graph.interpret import run_node
from rewriter.graph.lookup import module_of, outputs
from rewriter.graph.ops import LAYER_TYPES

# The answers of this many inputs are enough: the sums are over thousands of positions and weights.
INPUTS = 48
# Inputs in one backward pass; bounds the memory.
ROWS = 8


def weigh(
    gm: fx.GraphModule,
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    inputs: int = INPUTS,
    seed: int = 0,
    only: Collection[fx.Node] | None = None,
) -> None:
    """Write the influence of every channel and of every filter into the nodes' meta, in place.

    ``facts.INFLUENCE``: (C,) sum of g^2 over the positions of each channel of a value, mean over inputs.
    ``facts.WEIGHT_INFLUENCE``: (C_out, C_in / groups) of a layer: sum over a filter's weights of the squared gradient, when
    the bias follows (so that the mean of what an error adds is taken out), mean over inputs.

    Args:
        gm: canonical graph; its weights are not changed.
        batches: inputs (N, ...), or a tuple with one tensor for each input.
        inputs: how many of them are used.
        seed: of the projections.
        only: nodes that it is measured of; None: all.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = list(batches)
    fidelity = fidelity_of(gm, batches)
    sums: dict[tuple[fx.Node, str], Tensor] = {}
    flags = [(p, p.requires_grad) for p in gm.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    done = 0
    try:
        for batch in batches:
            whole = batch if isinstance(batch, tuple) else (batch,)
            for part in zip(*(x.split(ROWS) for x in whole), strict=True):
                kept = tuple(x[: inputs - done] for x in part)
                if len(kept[0]):
                    _accumulate(gm, kept, sums, generator, fidelity, only)
                    done += len(kept[0])
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    for (node, name), total in sums.items():
        facts.named(name).put(node, total / done)


def _accumulate(
    gm: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    sums: dict[tuple[fx.Node, str], Tensor],
    generator: torch.Generator,
    fidelity: Fidelity,
    only: Collection[fx.Node] | None = None,
) -> None:
    values, slopes = gradients(gm, inputs, generator, fidelity, only)
    channels, batch = channel_axes(gm), batch_axes(gm)
    for node, g in slopes.items():
        if g.ndim < 2:
            continue
        new = {"influence": _squares(g, channels.get(node, 1))}
        if node.op == "call_module" and isinstance(module_of(gm, node), LAYER_TYPES):
            x = values[node.args[0]].detach()  # type: ignore[index]
            first = batch.get(node, 0)  # inputs first, as their gradients are summed one by one
            x, g = x.movedim(first, 0), g.movedim(first, 0)
            new["weight_influence"] = _weight_gradients(module_of(gm, node), x, g)
        for name, value in new.items():
            key = (node, name)
            known = sums.get(key)
            if (
                known is not None and known.shape != value.shape
            ):  # an axis that grows with the batch
                known, value = known.sum().view(1), value.sum().view(1)
            sums[key] = value if known is None else known + value


def gradients(
    gm: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    generator: torch.Generator,
    fidelity: Fidelity,
    only: Collection[fx.Node] | None = None,
) -> tuple[dict[fx.Node, Any], dict[fx.Node, Tensor]]:
    """Every value of a graph, and g at every value that the answers depend on, for one projection of each input's answers.

    For an error d of a value, half the mean over inputs of (sum of g d)^2 is its damage to second order.

    Args:
        gm: canonical graph.
        inputs: of one batch.
        generator: of the projection.
        fidelity: the damage.
        only: nodes whose g is wanted, so that nothing is kept for others; None: all.
    """
    values: dict[fx.Node, Any] = {}
    feed = iter(x.detach().requires_grad_(only is None and x.is_floating_point()) for x in inputs)
    with torch.enable_grad():
        for node in gm.graph.nodes:
            if node.op == "output":
                continue
            values[node] = value = run_node(gm, node, values, feed)
            starts = only is not None and node in only and isinstance(value, Tensor)
            if starts and value.is_floating_point() and not value.requires_grad:
                values[node] = value.detach().requires_grad_()
        score = _score([values[n] for n in outputs(gm)], fidelity, generator)
    watched = [
        n
        for n, v in values.items()
        if isinstance(v, Tensor) and v.requires_grad and (only is None or n in only)
    ]
    found: Any = torch.autograd.grad(score, [values[n] for n in watched], allow_unused=True)
    slopes = {n: g for n, g in zip(watched, found, strict=True) if g is not None}
    return values, slopes


def _squares(x: Tensor, axis: int) -> Tensor:
    """(C,) sum of squares over all other axes, float64."""
    if axis == 1 and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        # row by row of channels that lie side by side: a fifth of the time of strided reads
        return x.permute(0, 2, 3, 1).flatten(1, 2).square().sum(1).double().sum(0)
    axes = [d for d in range(x.ndim) if d != axis]
    return torch.linalg.vector_norm(x, dim=axes).double().square()


def _score(answers: list[Tensor], fidelity: Fidelity, generator: torch.Generator) -> Tensor:
    """A number whose gradient has the Hessian of the damage as its second moment."""
    probe = fidelity.probe([a.detach() for a in answers], generator)
    return fidelity.scalar(answers, probe) * 2**0.5  # for the half in 1/2 g^2


def _weight_gradients(layer: Any, x: Tensor, g: Tensor) -> Tensor:
    """(C_out, C_in / groups): sum over samples of the squared gradients of a filter's weights, the input's mean taken out.

    Of a k x k filter the middle weight stands for all: neighbouring pixels are alike, and unfolding costs ten times the rest.
    """
    if isinstance(layer, nn.Linear):
        x, g = (v.unsqueeze(1) if v.ndim == 2 else v.flatten(1, -2) for v in (x, g))
        x, g, groups, taps = x.transpose(1, 2), g.transpose(1, 2), 1, 1
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        groups, taps = layer.groups, math.prod(layer.kernel_size)
        steps = tuple(
            slice(start, None, step)
            for start, step in zip(_middles(layer), layer.stride, strict=True)
        )
        x = x[(..., *steps)]
        sizes = [min(a, b) for a, b in zip(x.shape[2:], g.shape[2:], strict=True)]
        x, g = (v[(..., *[slice(0, n) for n in sizes])] for v in (x, g))
        x, g = x.flatten(2), g.flatten(2)
    else:  # transposed: the same for every weight
        size = layer.weight.shape[:2]
        each = float(g.square().sum()) * float(x.square().mean()) / math.prod(size)
        return torch.full(size, each, dtype=torch.float64)
    mean = x.mean((0, 2))
    if groups == x.shape[1]:
        each = (
            torch.linalg.vecdot(x, g)
            if g.shape[1] == x.shape[1]
            else _grouped(x, g, groups)[..., 0]
        )
        each = each - mean.repeat_interleave(g.shape[1] // groups) * g.sum(2)
        return taps * each.square().sum(0).double().unsqueeze(1)
    each = _grouped(x, g, groups)
    inner = mean.view(groups, -1).repeat_interleave(
        g.shape[1] // groups, 0
    )  # (C_out, C_in / groups)
    each = each - inner * g.sum(2).unsqueeze(2)
    return taps * each.square().sum(0).double()


def _middles(layer: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Where the middle weight of the filter lies for the first output, along each axis."""
    middles = [(k - 1) * d // 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    if isinstance(layer.padding, str):
        return middles if layer.padding == "valid" else [0] * len(middles)
    return [max(0, m - int(p)) for m, p in zip(middles, layer.padding, strict=True)]


def _grouped(x: Tensor, g: Tensor, groups: int) -> Tensor:
    """(N, C_out, C_in / groups) sum over positions of each output's gradient times each input it reads."""
    x, g = x.unflatten(1, (groups, -1)), g.unflatten(1, (groups, -1))
    return (g @ x.transpose(2, 3)).flatten(1, 2)
