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

from rewriter.channels import Channels
from rewriter.graph import is_call, layers, module_of
from rewriter.influence import Influence

# A norm of this order stands for the maximum: differentiable, and at most a few percent above it.
ORDER = 24.0
# Scales beyond this ratio gain nothing and cost float precision.
LARGEST = 1e3


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
    """D(s) of one graph for one way to store weights."""

    def __init__(
        self,
        gm: fx.GraphModule,
        channels: Channels,
        influence: Influence,
        quantized: set[str],
        per_channel: bool,
        per_channel_linear: bool = False,
    ) -> None:
        self.weights: list[_Weights] = []
        self.values: list[_Values] = []
        self.count = len(channels.fixed)
        for node in layers(gm):
            term = self._layer(gm, node, channels, influence)
            if term is not None and not node.meta.get("keep_float"):
                linear = is_call(gm, node, nn.Linear)
                self.weights.append(_Weights(*term, per_channel_linear if linear else per_channel))
        for node in gm.graph.nodes:
            name = node.name
            if name in quantized and name in channels.of and name in influence.values:
                low, high = (r.double() for r in node.meta["channel_range"])
                self.values.append(
                    _Values(channels.of[name], (-low).clamp_min(0), high.clamp_min(0), influence.values[name])
                )

    @staticmethod
    def _layer(
        gm: fx.GraphModule, node: fx.Node, channels: Channels, influence: Influence
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        m = module_of(gm, node)
        if node.name not in channels.of or source.name not in channels.of:
            return None
        if node.name not in influence.weights:
            return None
        size = m.weight.detach().double().abs().flatten(2).amax(2) if m.weight.ndim > 2 else m.weight.detach().double().abs()
        groups = getattr(m, "groups", 1)
        columns = channels.of[source.name].view(groups, -1).repeat_interleave(len(size) // groups, 0)
        if groups == 1:
            columns = columns[:1]
        return channels.of[node.name], columns, size, influence.weights[node.name]

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


def least_damage(
    damage: Damage, upper: Tensor, free: Tensor, steps: int = 300
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
    optimiser = torch.optim.Adam([x], lr=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.no_grad():
        before = float(damage(x))
    best, best_damage = x.detach().clone(), before
    for _ in range(steps):
        optimiser.zero_grad()
        value = damage(x)
        if float(value) < best_damage:
            best, best_damage = x.detach().clone(), float(value)
        value.log().backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            x.copy_(torch.where(free, torch.minimum(x, upper).clamp_min(-bound), torch.zeros_like(x)))
    return best, before, best_damage
