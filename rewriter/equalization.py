"""Channel scales with the least int8 damage, as a convex problem.

The damage of rounding is, to second order and for independent rounding errors,

    D(s) = sum_layers  step_l^2 / 12 * sum_oi F_oi s_i^2 / s_o^2   +   sum_values step_v^2 / 12 * sum_c F_c / s_c^2
    step_l = max_oi |w_oi| s_o / s_i / 127      step_v = (max_c high_c s_c - min_c low_c s_c) / 255

with s the scale of each channel and F its Fisher information (``rewriter.influence``). Every term is a sum of products of powers of s, so
log D is convex in log s (a geometric program): one optimum for all layers together, where Nagel et al. take
sqrt(range_1 range_2) pair by pair. The caps of ReLU6 are bounds on log s.
Source: after Nagel et al., 2019 (arXiv:1906.04721), section 4.1; Boyd et al., 2007 (doi:10.1007/s11081-007-9001-7).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rewriter.channels import HOMOGENEOUS, Channels
from rewriter.graph import is_call, layers, module_of
from rewriter.int8.scheme import QuantSpec

# A norm of this order stands for the maximum: differentiable, and at most a few percent above it.
ORDER = 24.0
# Scales beyond this ratio gain nothing and cost float precision.
LARGEST = 1e3
STEPS = 60


@dataclass(frozen=True)
class _Weights:
    """One layer's term: which variables its rows and columns are, |w| and F, each (O, I)."""

    rows: Tensor
    columns: Tensor
    size: Tensor
    influence: Tensor
    per_channel: bool


@dataclass(frozen=True)
class _Values:
    """One int8 value's term: its variables, the two ends of its range and F, each (C,)."""

    channels: Tensor
    low: Tensor
    high: Tensor
    influence: Tensor


class Damage:
    """D(s) of one graph.

    Args:
        gm: canonical graph with ``channel_range`` in its nodes' meta, and ``influence`` (``rewriter.influence.weigh``); where that
            is missing, every value's error counts relative to its own power.
        channels: the variables.
        weights: how weights of convolutions are stored; None: one scale per tensor.
        linear_weights: of linear layers.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        channels: Channels,
        weights: QuantSpec | None = None,
        linear_weights: QuantSpec | None = None,
    ) -> None:
        self.weights: list[_Weights] = []
        self.values: list[_Values] = []
        self.count = len(channels.fixed)
        known = _Known(gm)
        for node in layers(gm):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if node.meta.get("keep_float") or node.name not in channels.of:
                continue
            if source.name not in channels.of:
                continue
            spec = linear_weights if is_call(gm, node, nn.Linear) else weights
            m = module_of(gm, node)
            size = m.weight.detach().double().abs().flatten(1).unflatten(1, (m.weight.shape[1], -1))
            into = channels.of[source.name].view(getattr(m, "groups", 1), -1)
            if len(into) > 1:
                into = into.repeat_interleave(len(size) // len(into), 0)
            per_channel = spec is not None and spec.ch_axis is not None
            self.weights.append(
                _Weights(
                    channels.of[node.name], into, size.amax(2), known.of_weights(gm, node), per_channel
                )
            )
        for node in gm.graph.nodes:
            if node.name in channels.of and "channel_range" in node.meta and _stored(gm, node):
                low, high = (r.double() for r in node.meta["channel_range"])
                self.values.append(
                    _Values(
                        channels.of[node.name],
                        (-low).clamp_min(0),
                        high.clamp_min(0),
                        known.of_value(node),
                    )
                )

    def __call__(self, log_scale: Tensor) -> Tensor:
        """D for (V,) logarithms of the scales."""
        total = log_scale.new_zeros(())
        for t in self.weights:
            out, into = log_scale[t.rows], log_scale[t.columns]
            if into.shape[0] == 1:
                into = into[0]
                noise = (t.influence @ (2 * into).exp()) * (-2 * out).exp()
                if t.per_channel:
                    largest = self._norm_rows(t.size, into) * out.exp()
                else:
                    largest = self._norm_all(t.size, out, into)
            else:  # grouped: each row has inputs of its own
                noise = (t.influence * (2 * into).exp()).sum(1) * (-2 * out).exp()
                each = t.size * (-into).exp() * out.exp()[:, None]
                dims = 1 if t.per_channel else (0, 1)
                largest = torch.linalg.vector_norm(each, ORDER, dim=dims)
            total = total + (noise * (largest / 127) ** 2).sum()
        for v in self.values:
            s = log_scale[v.channels].exp()
            width = torch.linalg.vector_norm(v.high * s, ORDER) + torch.linalg.vector_norm(v.low * s, ORDER)
            total = total + (v.influence / s**2).sum() * (width / 255) ** 2
        return total / 24  # 1/12 of a step squared, and 1/2 of the second-order term

    @staticmethod
    def _norm_all(size: Tensor, out: Tensor, into: Tensor) -> Tensor:
        top = (out.detach().max() - into.detach().min()).item()
        peak = size.max().clamp_min(1e-30)
        powers = (size / peak) ** ORDER
        inner = powers @ (ORDER * (into.detach().min() - into)).exp()
        total = inner @ (ORDER * (out - out.detach().max())).exp()
        return peak * total.clamp_min(1e-300) ** (1 / ORDER) * torch.exp(torch.tensor(top))

    @staticmethod
    def _norm_rows(size: Tensor, into: Tensor) -> Tensor:
        peak = size.max().clamp_min(1e-30)
        least = into.detach().min()
        inner = ((size / peak) ** ORDER) @ (ORDER * (least - into)).exp()
        return peak * inner.clamp_min(1e-300) ** (1 / ORDER) * (-least).exp()


class _Known:
    """Influences of a graph's nodes, with a stand-in in the same unit where one is missing."""

    def __init__(self, gm: fx.GraphModule) -> None:
        shares = [
            float(n.meta["influence"].sum() * _power(n).mean())
            for n in gm.graph.nodes
            if _valid(n) and "channel_range" in n.meta
        ]
        # typical damage of an error as large as the value itself
        self.whole = sorted(shares)[len(shares) // 2] if shares else 1.0

    def of_value(self, node: fx.Node) -> Tensor:
        """(C,)"""
        if _valid(node):
            return node.meta["influence"].double()
        power = _power(node)
        each = self.whole / power.sum().clamp_min(1e-30)
        return each.expand_as(power)

    def of_weights(self, gm: fx.GraphModule, node: fx.Node) -> Tensor:
        """(C_out, C_in / groups)"""
        m = module_of(gm, node)
        shape = m.weight.shape[:2]
        known = node.meta.get("weight_influence")
        if known is not None and known.shape == shape:
            return known.double()
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if "channel_range" not in source.meta or "channel_range" not in node.meta:
            return torch.ones(shape, dtype=torch.float64)
        power = _power(source).view(-1, shape[1])
        rows = power.repeat_interleave(shape[0] // len(power), 0)
        return self.of_value(node)[:, None] * rows * m.weight[0, 0].numel()


def _valid(node: fx.Node) -> bool:
    known, shape = node.meta.get("influence"), node.meta.get("shape")
    return known is not None and shape is not None and known.shape == shape[1:2]


def _power(node: fx.Node) -> Tensor:
    """(C,) mean square, as if the values were spread evenly over their range."""
    low, high = (r.double() for r in node.meta["channel_range"])
    return (high**2 + high * low + low**2).clamp_min(1e-30) / 3


def _stored(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a value exists in int8: an activation that follows is computed in the same kernel."""
    if len(node.users) == 1 and is_call(gm, next(iter(node.users)), *HOMOGENEOUS, nn.ReLU6, nn.Hardtanh):
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
        if "channel_range" not in source.meta:
            free[variables] = False
            continue
        high = source.meta["channel_range"][1].double().clamp_min(1e-9) * (1 + margin)
        free[variables[high >= cap]] = False
        upper.scatter_reduce_(0, variables, torch.log(cap / high), "amin")
    return upper, free


def least_damage(
    damage: Damage, upper: Tensor, free: Tensor, steps: int = STEPS
) -> tuple[Tensor, float, float]:
    """The scales that minimise ``damage``.

    Args:
        damage: D(s).
        upper: (V,) bounds of the logarithms.
        free: (V,) which may move.
        steps: of Adam, which needs no line search and stands the kinks of the maxima.

    Returns:
        (V,) logarithms of the scales, D before, D after.
    """
    x = torch.zeros(damage.count, dtype=torch.float64, requires_grad=True)
    bound = torch.log(torch.tensor(LARGEST))
    upper = upper.clamp(-bound, bound)
    optimiser = torch.optim.Adam([x], lr=0.2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.no_grad():
        before = float(damage(x))
    best, best_damage = x.detach().clone(), before
    for _ in range(steps):
        optimiser.zero_grad()
        value = damage(x)
        now = float(value.detach())
        if now < best_damage:
            best, best_damage = x.detach().clone(), now
        value.log().backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            x.copy_(torch.where(free, torch.minimum(x, upper).clamp_min(-bound), torch.zeros_like(x)))
    return best, before, best_damage
