"""Layer norm whose channels spread -> the same scale of every channel, undone in the layers that read it.

Before: x -> layer norm (g, b) -> [moves] -> linear or convolution W
After:  x -> layer norm (g / s, b / s) -> the same -> W s

    s (C,) = range_c^a / largest|W[:, c]|^(1 - a)

Of some strengths a that one is taken for which least is predicted of what rounding the value and
rounding the weights add to the outputs of its readers together; where none helps there is no site.

Why: a few channels of the layer norms of transformers reach a hundred times what the others do,
    and one int8 range holds all of them. Since the norm has weights of its own, the channels can
    be scaled there for nothing; but what is taken from the value is put on the weights.
Exact: yes.
Cost: none.
Source: Xiao et al., 2023 (SmoothQuant, arXiv:2211.10438); Li et al., 2023 (RepQ-ViT,
    arXiv:2212.08254).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.channel_ranges import range_of, width
from rewriter.graph.lookup import find, is_call, module_of
from rewriter.int8.scheme import QuantScheme
from rewriter.rules._rule import Contract, RewriteRule, Site, mark

STRENGTHS = (0.0, 0.15, 0.3, 0.5, 0.65, 0.8, 1.0)
# Scaling must take away this share of the predicted error.
LEAST_GAIN = 0.2
_LEVELS, _WEIGHT_LEVELS = 255, 127


class ScaleNorm(RewriteRule):
    """One site for each layer norm that only layers read."""

    name: ClassVar[str] = "scale_norm"
    contract: ClassVar[Contract] = "exact"
    free: ClassVar[bool] = True

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        for node in gm.graph.nodes:
            if is_call(gm, node, nn.LayerNorm):
                yield self._site(gm, node)

    def site_at(self, gm: fx.GraphModule, anchor: str) -> Site | None:
        node = next((n for n in gm.graph.nodes if n.name == anchor), None)
        found = node is not None and is_call(gm, node, nn.LayerNorm)
        return self._site(gm, node) if found and node is not None else None

    def _site(self, gm: fx.GraphModule, node: fx.Node) -> Site:
        norm = module_of(gm, node)
        found = _readers(gm, node)
        if found.blocked:
            return self.site(node, blocked=found.blocked)
        if norm.weight is None or len(norm.normalized_shape) != 1:
            why = "it has no weights" if norm.weight is None else "it is over several axes"
            return self.site(node, blocked=why, readers=found.layers)
        low_high = range_of(node, norm.weight.numel())
        if low_high is None:
            return self.site(node, blocked="no calibrated channel ranges", readers=found.layers)
        left, _ = _best(gm, node, found.layers)
        blocked = ""
        if left > 1 - LEAST_GAIN:
            blocked = f"scaling leaves {left:.0%} of the rounding error"
        return self.site(node, blocked=blocked, readers=found.layers)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        node = find(gm, site.anchor)
        found = _readers(gm, node)
        _, scale = _best(gm, node, found.layers)
        norm = copy.deepcopy(module_of(gm, node))
        norm.weight = nn.Parameter(norm.weight.detach() / scale.to(norm.weight), False)
        if norm.bias is not None:
            norm.bias = nn.Parameter(norm.bias.detach() / scale.to(norm.bias), False)
        gm.set_submodule(str(node.target), norm)
        for reader in found.layers:
            layer = copy.deepcopy(module_of(gm, reader))
            weight = layer.weight.detach()
            shape = [1, -1, *[1] * (weight.ndim - 2)]
            layer.weight = nn.Parameter(weight * scale.to(weight).view(shape), False)
            gm.set_submodule(str(reader.target), layer)
        for value in (node, *found.moved):
            known = range_of(value, len(scale))
            if known is not None:
                facts.CHANNEL_RANGE.put(value, tuple(end / scale.to(end) for end in known))  # type: ignore[arg-type]
        mark(node, site)


@dataclass(frozen=True)
class _Found:
    layers: tuple[fx.Node, ...] = ()
    moved: tuple[fx.Node, ...] = ()
    blocked: str = ""


def _readers(gm: fx.GraphModule, norm: fx.Node) -> _Found:
    """The layers that read a norm's value, directly or moved, each with a weight for each of its channels."""
    size = module_of(gm, norm).normalized_shape[-1]
    layers: list[fx.Node] = []
    moved: list[fx.Node] = []
    queue = [(norm, len(facts.SHAPE.of(norm)) - 1)]
    while queue:
        value, axis = queue.pop()
        for user in value.users:
            last = axis == len(facts.SHAPE.of(value)) - 1
            if is_call(gm, user, nn.Linear) and last:
                layers.append(user)
            elif is_call(gm, user, nn.Conv2d, nn.Conv1d) and axis == 1:
                if module_of(gm, user).groups != 1:
                    return _Found(blocked=f"{user.name} has groups")
                layers.append(user)
            elif (there := _moved(user, value, axis, size)) is not None:
                moved.append(user)
                queue.append((user, there))
            else:
                return _Found(blocked=f"{user.name}, which reads it, is no layer")
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    layers = sorted(dict.fromkeys(layers), key=order.__getitem__)
    return _Found(tuple(layers), tuple(moved), "" if layers else "no layer reads it")


def _moved(user: fx.Node, value: fx.Node, axis: int, size: int) -> int | None:
    """Where the channels lie behind an operation that keeps them apart; None: it does not."""
    rank = len(facts.SHAPE.of(value))
    if user.op == "output" or not user.args or user.args[0] is not value:
        return None
    if user.target == "permute":
        dims = [int(d) % rank for d in user.args[1:]]  # type: ignore[arg-type]
        return dims.index(axis)
    if user.target == "transpose":
        a, b = (int(d) % rank for d in user.args[1:3])  # type: ignore[arg-type]
        return {a: b, b: a}.get(axis, axis)
    shape = facts.SHAPE.get(user)
    if axis != rank - 1 or not isinstance(shape, tuple) or not shape or shape[-1] != size:
        return None
    if user.target == "reshape":
        return len(shape) - 1
    if user.target is torch.mean:
        dims = user.args[1] if isinstance(user.args[1], (list, tuple)) else [user.args[1]]
        apart = all(int(d) % rank != axis for d in dims)  # type: ignore[arg-type]
        return len(shape) - 1 if apart else None
    if user.target is operator.getitem:
        index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
        plain = len(index) < rank and all(isinstance(i, (int, slice)) for i in index)
        return len(shape) - 1 if plain else None
    return None


def _best(gm: fx.GraphModule, node: fx.Node, readers: tuple[fx.Node, ...]) -> tuple[float, Tensor]:
    """The share of the predicted error that the best scale leaves, and that scale (C,)."""
    norm = module_of(gm, node)
    low, high = (end.double() for end in facts.CHANNEL_RANGE.of(node))
    power = norm.weight.detach().double().square()  # what is normalized has the power 1
    if norm.bias is not None:
        power = power + norm.bias.detach().double().square()
    matrices = [(r, _matrix(module_of(gm, r))) for r in readers]
    size = width(low, high).clamp_min(1e-9)
    weight = torch.stack([m.abs().amax((0, 2)) for _, m in matrices]).amax(0).clamp_min(1e-9)
    off = torch.ones_like(size)
    whole = _error(gm, low, high, power, matrices, off)
    best = 1.0, off
    for strength in STRENGTHS:
        scale = size**strength / weight ** (1 - strength)
        scale = scale / scale.log().mean().exp()
        left = _error(gm, low, high, power, matrices, scale) / max(whole, 1e-300)
        if left < best[0]:
            best = left, scale
    return best


def _matrix(layer: nn.Module) -> Tensor:
    """(O, C, taps) of a dense layer."""
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    return weight.double().reshape(*weight.shape[:2], -1)


def _error(
    gm: fx.GraphModule,
    low: Tensor,
    high: Tensor,
    power: Tensor,
    matrices: list[tuple[fx.Node, Tensor]],
    scale: Tensor,
) -> float:
    """What rounding adds to the readers' outputs, relative to their power, with channels divided by ``scale``."""
    scheme: QuantScheme | None = facts.SCHEME.get(gm)
    bottom, top = (low / scale).clamp_max(0).min(), (high / scale).clamp_min(0).max()
    step = (top - bottom) / _LEVELS
    if scheme is not None and scheme.activations.symmetric:
        step = torch.maximum(-bottom, top) * 2 / _LEVELS
    total = 0.0
    for node, matrix in matrices:
        scaled = matrix * scale[None, :, None]
        spec = None
        if scheme is not None:
            spec = scheme.linear_weights if is_call(gm, node, nn.Linear) else scheme.weights
        each = spec is None or spec.ch_axis is not None
        largest = scaled.abs().amax((1, 2)) if each else scaled.abs().amax().expand(len(scaled))
        weights = (largest / _WEIGHT_LEVELS).square().sum() * matrix.shape[2]
        error = step.square() * scaled.square().sum() + weights * (power / scale.square()).sum()
        made = (matrix.square() * power[None, :, None]).sum().clamp_min(1e-300)
        total += float(error / made) / 12
    return total
