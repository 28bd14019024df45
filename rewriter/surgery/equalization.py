"""Channel scales with the least int8 damage, as a convex problem.

The damage of rounding is, to second order and for independent rounding errors,

    D(s) = sum_layers  step_l^2 / 12 * sum_oi F_oi s_i^2 / s_o^2   +   sum_values step_v^2 / 12 * sum_c F_c / s_c^2
    step_l = max_oi |w_oi| s_o / s_i / 127      step_v = (max_c high_c s_c - min_c low_c s_c) / 255

with s the scale of each channel and F its Fisher information (``rewriter.damage.fisher``). Every
term is a sum of products of powers of s, so log D is convex in log s (a geometric program): one
optimum for all layers together, where Nagel et al. take sqrt(range_1 range_2) pair by pair. The
caps of ReLU6 are bounds on log s.
Source: after Nagel et al., 2019 (arXiv:1906.04721), section 4.1; Boyd et al., 2007 (doi:10.1007/s11081-007-9001-7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.channel_ranges import range_of
from rewriter.graph.lookup import is_call, layers, module_of
from rewriter.graph.ops import CLIP_TYPES
from rewriter.int8.scheme import QuantSpec
from rewriter.surgery.channel_scales import HOMOGENEOUS, Channels

Array = NDArray[Any]
TINY = 1e-300
# A norm of this order stands for the maximum: differentiable, and at most a few percent above it.
ORDER = 24.0
# Scales beyond this ratio gain nothing and cost float precision.
LARGEST = 1e3
STEPS = 80
RATE = 0.2


@dataclass(frozen=True)
class _Dense:
    """A layer whose every output reads all inputs: variables of its rows (O,) and columns (I,), and (O, I) tables."""

    rows: Array
    columns: Array
    influence: Array
    powers: Array  # (|w| / peak) ^ ORDER
    peak: float
    per_channel: bool

    def __call__(self, x: Array, slope: Array) -> float:
        out, into = x[self.rows], x[self.columns]
        least, most = into.min(), out.max()
        a, r = np.exp(2 * into), np.exp(ORDER * (least - into))
        noise, reach = self.influence @ a, self.powers @ r
        if self.per_channel:  # the rows' own scales cancel: step and error grow alike
            square = (self.peak * np.exp(-least)) ** 2 * np.maximum(reach, TINY) ** (2 / ORDER)
            each = noise * square
            d_into = 2 * (square @ self.influence) * a
            d_into -= 2 * ((each / np.maximum(reach, TINY)) @ self.powers) * r
            slope += np.bincount(self.columns, d_into, len(slope))
            return float(each.sum())
        b, t = np.exp(-2 * out), np.exp(ORDER * (out - most))
        each, share = noise * b, reach * t
        total, sum_ = each.sum(), max(share.sum(), TINY)
        value = total * (self.peak * np.exp(most - least)) ** 2 * sum_ ** (2 / ORDER)
        d_out = share / sum_ - each / max(total, TINY)
        d_into = (b @ self.influence) * a / max(total, TINY) - (t @ self.powers) * r / sum_
        slope += 2 * value * np.bincount(self.rows, d_out, len(slope))
        slope += 2 * value * np.bincount(self.columns, d_into, len(slope))
        return float(value)


@dataclass(frozen=True)
class _Grouped:
    """A layer with groups: (O, I / groups) tables, ``columns`` too, since each output has inputs of its own."""

    rows: Array
    columns: Array
    influence: Array
    powers: Array
    peak: float
    per_channel: bool

    def __call__(self, x: Array, slope: Array) -> float:
        out, into = x[self.rows][:, None], x[self.columns]
        noise = self.influence * np.exp(2 * (into - out))
        most = (out - into).max(1, keepdims=True) if self.per_channel else (out - into).max()
        share = self.powers * np.exp(ORDER * (out - into - most))
        axes = 1 if self.per_channel else (0, 1)
        total = noise.sum(axes, keepdims=True)
        sums = np.maximum(share.sum(axes, keepdims=True), TINY)
        value = total * (self.peak * np.exp(most)) ** 2 * sums ** (2 / ORDER)
        change = 2 * value * (noise / np.maximum(total, TINY) - share / sums)  # by the columns
        slope += np.bincount(self.columns.ravel(), change.ravel(), len(slope))
        slope -= np.bincount(self.rows, change.sum(1), len(slope))
        return float(value.sum())


class _Values:
    """All int8 values: for each its variables (C,), the two ends of its range, both positive, and its influence.

    They lie behind one another in one array, since a network has hundreds of them and each is short.
    """

    def __init__(self, parts: Sequence[tuple[Array, Array, Array, Array]]) -> None:
        sizes = [len(channels) for channels, *_ in parts]
        self.channels, low, high, self.influence = (
            np.concatenate(x) for x in zip(*parts, strict=True)
        )
        with np.errstate(divide="ignore"):
            self.ends = np.log(low), np.log(high)
        self.starts = np.cumsum([0, *sizes[:-1]])
        self.value = np.repeat(np.arange(len(sizes)), sizes)

    def __call__(self, x: Array, slope: Array) -> float:
        s = x[self.channels]
        noise = self.influence * np.exp(-2 * s)
        total = np.add.reduceat(noise, self.starts)
        width, change = np.zeros_like(total), np.zeros_like(s)
        for end in self.ends:
            reach = end + s
            peak = np.maximum(np.maximum.reduceat(reach, self.starts), np.log(TINY))
            powers = np.exp(ORDER * (reach - peak[self.value]))
            sums = np.maximum(np.add.reduceat(powers, self.starts), TINY)
            norm = np.exp(peak) * sums ** (1 / ORDER)
            width += norm
            change += (norm / sums)[self.value] * powers
        d = 2 * (change * (total * width)[self.value] - noise * (width**2)[self.value])
        slope += np.bincount(self.channels, d, len(slope))
        return float((total * width**2).sum())


class Damage:
    """D(s) of one graph.

    Args:
        gm: canonical graph with ``channel_range`` in its nodes' meta, and ``influence`` (``rewriter.damage.fisher.weigh``); where that
            is missing, every value's error counts relative to its own power.
        channels: the variables.
        weights: how weights of convolutions are stored; None: one scale per tensor.
        linear_weights: of linear layers.
        moving: (V,) variables that are looked for; terms without any are left out. None: all.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        channels: Channels,
        weights: QuantSpec | None = None,
        linear_weights: QuantSpec | None = None,
        moving: Tensor | None = None,
    ) -> None:
        self.count = len(channels.fixed)
        self.terms: list[tuple[_Dense | _Grouped | _Values, float]] = []
        values: list[tuple[Array, Array, Array, Array]] = []
        known = _Known(gm)
        for node in layers(gm):
            if not _scaled(gm, node, channels) or facts.KEEP_FLOAT.get(node):
                continue
            if not _moves(channels, moving, node, *node.all_input_nodes):
                continue
            spec = linear_weights if is_call(gm, node, nn.Linear) else weights
            self.terms.append((_layer(gm, node, channels, known, spec), 1 / 127**2))
        for node in gm.graph.nodes:
            variables = channels.of.get(node.name)
            seen = None if variables is None else range_of(node, len(variables))
            if not _moves(channels, moving, node):
                continue
            if variables is not None and seen is not None and _stored(gm, node):
                low, high = (r.double().numpy() for r in seen)
                ends = np.maximum(-low, 0), np.maximum(high, 0)
                values.append((variables.numpy(), *ends, known.of_value(node).numpy()))
        if values:
            self.terms.append((_Values(values), 1 / 255**2))

    def __call__(self, logs: Array) -> tuple[float, Array]:
        """D and its gradient for (V,) logarithms of the scales."""
        total, slope = 0.0, np.zeros(self.count)
        for term, unit in self.terms:
            part = np.zeros(self.count)
            total += unit * term(logs, part)
            slope += unit * part
        return total / 24, slope / 24  # 1/12 of a step squared, and 1/2 of the second-order term


def _moves(channels: Channels, moving: Tensor | None, *nodes: fx.Node) -> bool:
    """Whether any of some values' scales is looked for."""
    known = [channels.of[n.name] for n in nodes if n.name in channels.of]
    return moving is None or any(bool(moving[v].any()) for v in known)


def _scaled(gm: fx.GraphModule, node: fx.Node, channels: Channels) -> bool:
    source = node.args[0]
    known = node.name in channels.of and isinstance(source, fx.Node) and source.name in channels.of
    return known and is_call(gm, node, nn.Conv1d, nn.Conv2d, nn.Linear)


def _layer(
    gm: fx.GraphModule, node: fx.Node, channels: Channels, known: _Known, spec: QuantSpec | None
) -> _Dense | _Grouped:
    m, source = module_of(gm, node), node.args[0]
    assert isinstance(source, fx.Node)
    size = m.weight.detach().double().abs().flatten(1).unflatten(1, (m.weight.shape[1], -1))
    size = size.amax(2).numpy()
    peak = max(float(size.max()), TINY)
    rows, into = channels.of[node.name].numpy(), channels.of[source.name].numpy()
    groups = getattr(m, "groups", 1)
    kind = _Dense
    if groups > 1:
        kind, into = _Grouped, into.reshape(groups, -1).repeat(len(size) // groups, 0)
    per_channel = spec is not None and spec.ch_axis is not None
    influence = known.of_weights(gm, node).numpy()
    return kind(rows, into, influence, (size / peak) ** ORDER, peak, per_channel)


class _Known:
    """Influences of a graph's nodes, with a stand-in in the same unit where one is missing."""

    def __init__(self, gm: fx.GraphModule) -> None:
        shares = [
            float(facts.INFLUENCE.of(n).sum() * _power(n).mean())
            for n in gm.graph.nodes
            if _valid(n) and facts.CHANNEL_RANGE.known(n)
        ]
        # typical damage of an error as large as the value itself
        self.whole = sorted(shares)[len(shares) // 2] if shares else 1.0

    def of_value(self, node: fx.Node) -> Tensor:
        """(C,)"""
        if _valid(node):
            return facts.INFLUENCE.of(node).double()
        power = _power(node)
        each = self.whole / power.sum().clamp_min(1e-30)
        return each.expand_as(power)

    def of_weights(self, gm: fx.GraphModule, node: fx.Node) -> Tensor:
        """(C_out, C_in / groups)"""
        m = module_of(gm, node)
        shape = m.weight.shape[:2]
        known = facts.WEIGHT_INFLUENCE.get(node)
        if known is not None and known.shape == shape:
            return known.double()
        source = node.args[0]
        assert isinstance(source, fx.Node)
        inputs = shape[1] * getattr(m, "groups", 1)
        if range_of(source, inputs) is None or range_of(node, shape[0]) is None:
            return torch.ones(shape, dtype=torch.float64)
        power = _power(source).view(-1, shape[1])
        rows = power.repeat_interleave(shape[0] // len(power), 0)
        return self.of_value(node)[:, None] * rows * m.weight[0, 0].numel()


def _valid(node: fx.Node) -> bool:
    known, shape = facts.INFLUENCE.get(node), facts.SHAPE.get(node)
    return known is not None and shape is not None and known.shape == shape[1:2]


def _power(node: fx.Node) -> Tensor:
    """(C,) mean square, as if the values were spread evenly over their range."""
    low, high = (r.double() for r in facts.CHANNEL_RANGE.of(node))
    return (high**2 + high * low + low**2).clamp_min(1e-30) / 3


def _stored(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a value exists in int8: an activation that follows is computed in the same kernel."""
    if len(node.users) == 1 and is_call(gm, next(iter(node.users)), *HOMOGENEOUS, *CLIP_TYPES):
        return False
    return any(n.op != "output" for n in node.users)


def log_bounds(gm: fx.GraphModule, channels: Channels, margin: float) -> tuple[Tensor, Tensor]:
    """Upper bounds (V,) of the logarithms, and which variables (V,) may move, given the caps of ReLU6.

    A channel that reaches a cap keeps its scale, so that the cap stays one number that int8 saturation carries out. One that stays below it
    on the calibration inputs may be scaled until ``margin`` is left.
    """
    upper = torch.full((len(channels.fixed),), float("inf"), dtype=torch.float64)
    free = ~channels.fixed
    nodes = {n.name: n for n in gm.graph.nodes}
    for name, cap in channels.caps.items():
        source = nodes[name].args[0]
        assert isinstance(source, fx.Node)
        variables = channels.of[name]
        seen = range_of(source, len(variables))
        if seen is None:
            free[variables] = False
            continue
        high = seen[1].double().clamp_min(1e-9) * (1 + margin)
        free[variables[high >= cap]] = False
        upper.scatter_reduce_(0, variables, torch.log(cap / high), "amin")
    return upper, free


def dead_bounds(gm: fx.GraphModule, channels: Channels) -> tuple[Tensor, Tensor]:
    """Bounds (V,) of the logarithms from below and above, for channels that hold nothing but zero.

    No error of theirs costs anything, so that nothing else keeps their scales from drifting: their filters may grow to the
    largest of the layer that makes them, and what reads them to the largest of the layer that reads them. Others are free.
    """
    count = len(channels.fixed)
    low, high = (torch.full((count,), s * torch.inf, dtype=torch.float64) for s in (-1, 1))
    alive = torch.zeros(count, dtype=torch.bool)
    for node in gm.graph.nodes:
        variables = channels.of.get(node.name)
        seen = None if variables is None else range_of(node, len(variables))
        if variables is not None and _stored(gm, node):
            moves = torch.ones(len(variables), dtype=torch.bool)
            if seen is not None:
                moves = (seen[0] != 0) | (seen[1] != 0)
            alive[variables[moves.cpu()]] = True
    for node in layers(gm):
        if not _scaled(gm, node, channels):
            continue
        m, source = module_of(gm, node), node.args[0]
        assert isinstance(source, fx.Node)
        size = m.weight.detach().double().abs().cpu().flatten(1)
        size = size.unflatten(1, (m.weight.shape[1], -1)).amax(2)  # (O, I / groups)
        peak, groups = size.max().clamp_min(TINY), getattr(m, "groups", 1)
        rows = size.amax(1)
        columns = size.view(groups, -1, size.shape[1]).amax(1).flatten()
        high.scatter_reduce_(0, channels.of[node.name], torch.log(peak / rows), "amin")
        low.scatter_reduce_(0, channels.of[source.name], torch.log(columns / peak), "amax")
    low[alive], high[alive] = -torch.inf, torch.inf
    return torch.minimum(low, high), high


def least_damage(
    damage: Damage,
    upper: Tensor,
    free: Tensor,
    steps: int = STEPS,
    lower: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, float, float]:
    """The scales that minimise ``damage``.

    Adam needs no line search and stands the kinks of the bounds.

    Args:
        damage: D(s).
        upper: (V,) bounds of the logarithms.
        free: (V,) which may move.
        steps: of Adam.
        lower: (V,) bounds of the logarithms from below.
        start: (V,) logarithms to begin at, which those that may not move keep; None: 0.

    Returns:
        (V,) logarithms of the scales, D before, D after.
    """
    bound = float(np.log(LARGEST))
    above, moves = np.minimum(upper.numpy(), bound), free.numpy()
    below = np.full_like(above, -bound) if lower is None else np.maximum(lower.numpy(), -bound)
    below = np.minimum(below, above)
    first, mean, square = (np.zeros(damage.count) for _ in range(3))
    if start is not None:
        first = start.numpy()
    x = np.where(moves, np.clip(first, below, above), first)
    best, before, least = x, damage(x)[0], float("inf")
    for step in range(1, steps + 1):
        now, slope = damage(x)
        if now < least:
            best, least = x, now
        slope = slope / max(now, TINY)  # of log D
        mean += 0.1 * (slope - mean)
        square += 0.01 * (slope**2 - square)
        rate = RATE * (1 + np.cos(np.pi * step / steps)) / 2
        move = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
        x = np.where(moves, np.clip(x - rate * move, below, above), first)
    return torch.from_numpy(best), before, least
