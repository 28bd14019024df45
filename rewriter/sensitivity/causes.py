"""Why a layer is harmful in int8, as numbers with thresholds.

Each cause is one ratio that is 1 (or 0) where all is well. Ranges are compared by what 99.9 % of
the values use, so that one stray value is called an outlier and not a wide channel. A cause is
named only where its side of the layer (weight, input, output) carries a share of the damage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.damage.grouping import fidelity_of
from rewriter.graph import facts
from rewriter.graph.axes import channel_axes
from rewriter.graph.channel_ranges import channel_range
from rewriter.graph.interpret import walk
from rewriter.graph.lookup import module_of
from rewriter.int8.annotate import annotation, is_layer, moves_values
from rewriter.int8.calibrate import input_scale
from rewriter.int8.scheme import channel_axis, weight_scale
from rewriter.int8.simulate import Quantized
from rewriter.repair.useful_ranges import useful_share
from rewriter.sensitivity.screen import Screening

# The number at which each cause is named. A range three times too wide costs 1.6 of 8 bits.
THRESHOLDS: dict[str, float] = {
    "weight_channel_spread": 3.0,
    "weight_outliers": 4.0,
    "dead_channels": 2.0,
    "bias_overflow": float(2**31),  # the weight scale is then twice as coarse as it need be
    "activation_channel_spread": 3.0,
    "activation_outliers": 0.5,
    "shared_range": 2.5,
    "saturating_input": 0.001,
    "idle_range": 0.7,  # half a bit
}
# Shares: the smaller, the worse.
SHARES = ("activation_outliers", "idle_range")
# A side of the layer with less than this share of the damage is not what hurts.
SIDE = 0.2
USED = 0.999
WEIGHT_USED = 0.99
# Values of a channel from which its quantiles are taken.
QUANTILE_VALUES = 1 << 14


@dataclass(frozen=True)
class Cause:
    """One reason, its number, the threshold it passed, and the tensor it is about."""

    name: str
    number: float
    threshold: float
    about: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "cause": self.name,
            "number": float(f"{self.number:.4g}"),
            "threshold": self.threshold,
            "about": self.about,
        }


@dataclass(frozen=True)
class Usage:
    """How a value uses its range on some inputs.

    Args:
        width: (C,) width of what 99.9 % of each channel's values span, zero included.
        low, high: (C,) range of each channel.
        outside: share of all values outside the calibrated range.
    """

    width: Tensor
    low: Tensor
    high: Tensor
    outside: float


def find_causes(
    quantized: Quantized, screening: Screening, harmful: Sequence[fx.Node], inputs: Tensor
) -> dict[str, tuple[Cause, ...]]:
    """The causes of each harmful layer, the strongest first, by node name.

    Args:
        quantized: the network.
        screening: tells which side of a layer carries its damage.
        harmful: the layers to explain.
        inputs: (N, ...) a few inputs of the kind the network will see.
    """
    values = {v for n in harmful for v in (*_read(n), *_returned(quantized, screening, n))}
    values |= {s for v in values for s in (*_sources(v), *_before(quantized, v))}
    usage = _usage(quantized, values, inputs)
    fidelity = fidelity_of(quantized.gm, [inputs])
    used = {v: useful_share(quantized, v, fidelity) for v in values if _stored(quantized, v)}
    return {n.name: _causes_of(quantized, screening, n, usage, used) for n in harmful}


def _stored(quantized: Quantized, value: fx.Node) -> bool:
    return annotation(value).range_of in quantized.calibration.values


def _causes_of(
    quantized: Quantized,
    screening: Screening,
    node: fx.Node,
    usage: Mapping[fx.Node, Usage],
    used: Mapping[fx.Node, float],
) -> tuple[Cause, ...]:
    weight, read, returned = _sides(screening, node.name)
    total = max(screening.damage(screening.layer(node.name)), 1e-30)
    found: list[Cause] = []
    if weight >= SIDE * total:
        found += _weight_causes(quantized, node, usage)
    if read >= SIDE * total:
        for value in _read(node):
            idle = [c for v in (value, *_before(quantized, value)) for c in _idle(v, used)]
            found += idle or _value_causes(quantized, value, usage)
    if returned >= SIDE * total:
        for value in _returned(quantized, screening, node):
            found += _idle(value, used) or _output_causes([value], usage)
    found.sort(key=lambda c: -_strength(c))
    return tuple(found)


def _idle(value: fx.Node, used: Mapping[fx.Node, float]) -> list[Cause]:
    """Levels spent where nothing that reads the value can tell them apart, as below -3 before a hardswish."""
    found: list[Cause] = []
    _name(found, "idle_range", used.get(value, 1.0), value.name)
    return found


def _before(quantized: Quantized, value: fx.Node) -> list[fx.Node]:
    """The values that an activation reads rounded, of which ``value`` is the result: no layer is charged with them."""
    if value.op != "call_module" or is_layer(quantized.gm, value):
        return []
    return _read(value)


def _strength(cause: Cause) -> float:
    ratio = cause.number / cause.threshold
    return 1 / max(ratio, 1e-9) if cause.name in SHARES else ratio


def _sides(screening: Screening, name: str) -> tuple[float, float, float]:
    """Damage of the weight, of the values read and of the result of a layer."""

    def total(edges: tuple[tuple[str, str], ...]) -> float:
        return (
            screening.damage(torch.stack([screening.edges[e] for e in edges]).sum(0))
            if edges
            else 0.0
        )

    weight = screening.damage(screening.weights[name]) if name in screening.weights else 0.0
    return weight, total(screening.parts.inputs[name]), total(screening.parts.returned[name])


def _read(node: fx.Node) -> list[fx.Node]:
    """The values that a layer reads rounded."""
    return [n for n in node.all_input_nodes if n.name in annotation(node).reads]


def _returned(quantized: Quantized, screening: Screening, node: fx.Node) -> list[fx.Node]:
    names = {value for _, value in screening.parts.returned[node.name]}
    return [n for n in quantized.gm.graph.nodes if n.name in names]


def _sources(value: fx.Node) -> list[fx.Node]:
    """The values that a concatenation or sum puts under one range."""
    while value.op == "call_function" and value.target is torch.flatten:
        value = value.all_input_nodes[0]
    if value.op == "call_function" and value.target in (torch.cat, torch.add):
        return list(value.all_input_nodes)
    return []


# ------------------------------------------------------------------------------------ weights


def _weight_causes(
    quantized: Quantized, node: fx.Node, usage: Mapping[fx.Node, Usage]
) -> list[Cause]:
    layer, note = module_of(quantized.gm, node), annotation(node)
    assert note.weight is not None
    axis = channel_axis(layer, note.weight)
    weight: Any = layer.weight
    rows = weight.detach().abs()
    rows = (rows.transpose(0, 1) if axis == 1 else rows).reshape(rows.shape[axis or 0], -1).cpu()
    largest = rows.amax(1)
    used = _quantile(rows, WEIGHT_USED)
    found: list[Cause] = []
    dead = _dead_outputs(quantized, node, len(rows))
    live = largest[~dead]
    if axis is None and dead.any() and len(live):
        _name(found, "dead_channels", largest[dead].max() / live.max(), node.name)
    if axis is None and not found:
        _name(found, "weight_channel_spread", _spread(used[~dead]), node.name)
    if axis is None:
        _name(found, "weight_outliers", largest.max() / used.max(), node.name)
    else:
        # only the channels that are not dead count; most of them must be wasted to hurt
        ratio = (largest / used.clamp_min(1e-30))[used > 1e-6 * used.max()]
        _name(found, "weight_outliers", ratio.max(), node.name)
    step = input_scale(quantized.gm, node, quantized.calibration.values)
    bias: Any = layer.bias
    if bias is not None and step is not None:
        scale = weight_scale(weight, note.weight, axis).cpu()
        number = float((bias.detach().abs().cpu() / (scale * step)).max())
        _name(found, "bias_overflow", number, node.name)
    return found


def _dead_outputs(quantized: Quantized, node: fx.Node, channels: int) -> Tensor:
    """(C,) whether an output channel never changes: then only its bias matters."""
    after: fx.Node = node
    stats = quantized.calibration.stats
    while after.name not in stats and len(after.users) == 1:
        (after,) = after.users
        if after.op == "output" or after.name not in stats:
            break
    seen = stats.get(after.name)
    if seen is None or len(seen.channel_low) != channels:
        return torch.zeros(channels, dtype=torch.bool)
    width = seen.channel_high - seen.channel_low
    return width <= 1e-5 * float(width.max())


def _spread(width: Tensor) -> float:
    """How much wider the widest channel is than the one in the middle."""
    alive = width[width > 0]
    return float(alive.max() / alive.median()) if len(alive) > 1 else 1.0


def _quantile(rows: Tensor, share: float) -> Tensor:
    """(C,) the value that ``share`` of each row does not exceed; of a short row the largest."""
    n = rows.shape[1]
    return rows.kthvalue(max(1, min(n, -int(-n * share // 1))), dim=1).values


def _name(found: list[Cause], name: str, number: Any, about: str) -> None:
    """Add a cause if its number passes the threshold."""
    number, threshold = float(number), THRESHOLDS[name]
    below = name in SHARES
    if (number <= threshold) if below else (number >= threshold):
        found.append(Cause(name, number, threshold, about))


# -------------------------------------------------------------------------------- activations


def _value_causes(
    quantized: Quantized, value: fx.Node, usage: Mapping[fx.Node, Usage]
) -> list[Cause]:
    found: list[Cause] = []
    seen, about = usage[value], value.name
    low, high = quantized.calibration.values[annotation(value).range_of]
    whole = max(high, 0.0) - min(low, 0.0)
    constant = (seen.high - seen.low) <= 1e-5 * max(whole, 1e-30)
    live = seen.width[~constant]
    if constant.any() and len(live):
        _name(
            found, "dead_channels", seen.width[constant].max() / live.max().clamp_min(1e-30), about
        )
    own = float((seen.high.clamp_min(0).max() - seen.low.clamp_max(0).min()).clamp_min(1e-30))
    _name(found, "saturating_input", seen.outside, about)
    sources = [usage[s] for s in _sources(value)]
    shared = max([whole / own if _has_partners(quantized, value) else 1.0, _uneven(sources)])
    _name(found, "shared_range", shared, about)
    if found:
        return found
    _name(found, "activation_channel_spread", _spread(live), about)
    _name(found, "activation_outliers", float(seen.width.max()) / max(whole, 1e-30), about)
    return found


def _uneven(sources: Sequence[Usage]) -> float:
    """How much wider the widest value of a concatenation is than the narrowest."""
    widths = [float(s.width.max()) for s in sources]
    return max(widths) / max(min(widths), 1e-30) if len(widths) > 1 else 1.0


def _has_partners(quantized: Quantized, value: fx.Node) -> bool:
    """Whether values made elsewhere have the same range."""
    owner = annotation(value).range_of
    sharing = [
        n
        for n in quantized.gm.graph.nodes
        if facts.INT8.known(n)
        and annotation(n).range_of == owner
        and not moves_values(quantized.gm, n)
    ]
    return len(sharing) > 1


def _output_causes(values: Sequence[fx.Node], usage: Mapping[fx.Node, Usage]) -> list[Cause]:
    """A head: the channels of its result mean different things and share one range."""
    found: list[Cause] = []
    for value in values:
        _name(found, "shared_range", _spread(usage[value].width), value.name)
    return found


def _usage(quantized: Quantized, wanted: set[fx.Node], inputs: Tensor) -> dict[fx.Node, Usage]:
    found: dict[fx.Node, Usage] = {}
    axes = channel_axes(quantized.gm)
    with torch.no_grad():
        for node, value in walk(quantized.gm, (inputs,)):
            if node in wanted and isinstance(value, Tensor) and value.ndim >= 2:
                found[node] = _usage_of(quantized, node, value, axes.get(node, 1))
            if len(found) == len(wanted):
                break
    return found


def _usage_of(quantized: Quantized, node: fx.Node, value: Tensor, axis: int) -> Usage:
    value = value.detach().float().movedim(axis, 1)
    least, most = (r.cpu() for r in channel_range(value))
    rows = value.transpose(0, 1)
    each = max(1, value[:, 0].numel() // QUANTILE_VALUES)
    if value.ndim > 2 and each > 1:  # every so many places, before anything is copied
        rows = rows.flatten(2)[:, :, ::each]
    rows = rows.reshape(value.shape[1], -1).cpu()
    tail = (1 - USED) / 2
    top = _quantile(rows, 1 - tail).clamp_min(0)
    bottom = -_quantile(-rows, 1 - tail).clamp_min(0)
    outside = 0.0
    note = annotation(node)
    if note.output is not None and note.range_of in quantized.calibration.values:
        low, high = quantized.calibration.values[note.range_of]
        if float(least.min()) < low or float(most.max()) > high:
            outside = float(((value < low) | (value > high)).double().mean())
    return Usage(top - bottom, least, most, outside)
