"""The network before and after a plan as plain facts: its layers in order, and the ranges of their channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter import Quantized
from rewriter.graph import facts, kind_of, layer_name, layers, module_of
from rewriter.int8 import annotation

PARTS = 4  # of a layer that was split, whose ranges are shown


def layer_list(gm: fx.GraphModule) -> list[dict[str, Any]]:
    """Weighted layers and joins (sum, concatenation) in running order.

    Each has ``name`` (in the graph), ``layer`` (the user's module), ``kind``, ``size``, ``made_by`` (the step that
    wrote it, "" where none did), ``in_float`` and ``reads``: the names of those among them that it reads, through
    whatever lies between.
    """
    weighted = set(layers(gm))
    found: list[dict[str, Any]] = []
    behind: dict[fx.Node, list[str]] = {}
    for node in gm.graph.nodes:
        joins = node.op == "call_function" and len(node.all_input_nodes) > 1
        reads = list(dict.fromkeys(n for x in node.all_input_nodes for n in behind[x]))
        behind[node] = [node.name] if node in weighted or joins else reads
        if node not in weighted and not joins:
            continue
        found.append(
            {
                "name": node.name,
                "layer": layer_name(node) if node in weighted else "",
                "kind": kind_of(gm, node),
                "size": _size(module_of(gm, node)) if node in weighted else "",
                "made_by": str(facts.REWRITTEN_BY.get(node) or ""),
                "in_float": bool(facts.KEEP_FLOAT.get(node)),
                "reads": reads,
            }
        )
    return found


def channel_ranges(quantized: Quantized, node: str, layer: str) -> dict[str, list[dict[str, Any]]]:
    """Ranges of the channels of a layer's ``weights``, of what it ``reads`` and of what it ``writes``.

    Each is a list of tensors (several where the layer was split) with ``name``, ``low`` and ``high`` (C,) by
    channel, and ``limits``: the int8 range, [low, high] of the tensor or a pair for each channel; None in float.

    Args:
        quantized: The network, calibrated.
        node: Name in the graph of the layer before any rewrite, or of another value.
        layer: The user's name of it; what bears either name is a part of it, else what a step anchored at it made.
    """
    weighted = layers(quantized.gm)
    parts = [n for n in weighted if n.name == node or layer_name(n) == layer]
    if not parts:
        made = {n: str(facts.REWRITTEN_BY.get(n, "")).partition("@")[2] for n in weighted}
        parts = [n for n in weighted if made[n] == node]
    found: dict[str, list[dict[str, Any]]] = {"weights": [], "reads": [], "writes": []}
    if not parts:  # no layer: a value, which is there as long as no step replaced it
        value = next((n for n in quantized.gm.graph.nodes if n.name == node), None)
        said = _activation(quantized, value)
        found["writes"] = [] if said is None else [said]
    for part in parts[:PARTS]:
        found["weights"].append(_weights(quantized, part))
        for key, value in (
            ("reads", part.all_input_nodes[0]),
            ("writes", _written(quantized, part)),
        ):
            said = _activation(quantized, value)
            if said is not None and said["name"] not in {v["name"] for v in found[key]}:
                found[key].append(said)
    return found


def trimmed(tensor: dict[str, Any], most: int) -> dict[str, Any]:
    """At most so many channels of a tensor's ranges: the widest, and an even choice of the others, the widest first.

    ``channels`` says which they are, ``count`` how many there were.
    """
    widths = [
        max(h, 0.0) - min(v, 0.0) for v, h in zip(tensor["low"], tensor["high"], strict=True)
    ]
    order = sorted(range(len(widths)), key=lambda c: -widths[c])
    if len(order) > most:
        rest, count = order[most // 4 :], most - most // 4
        order = order[: most // 4] + [rest[i * len(rest) // count] for i in range(count)]
    limits = tensor["limits"]
    if limits is not None and isinstance(limits[0], list):
        limits = [limits[c] for c in order]
    return {
        "name": tensor["name"],
        "count": len(widths),
        "channels": order,
        "low": [tensor["low"][c] for c in order],
        "high": [tensor["high"][c] for c in order],
        "limits": limits,
    }


def spread(tensors: Sequence[dict[str, Any]]) -> float | None:
    """Width of the widest channel over that of the median one, the worst of some tensors; None without any."""
    worst: list[float] = []
    for tensor in tensors:
        low, high = (torch.tensor(tensor[k]).double() for k in ("low", "high"))
        widths = high.clamp_min(0) - low.clamp_max(0)
        middle = float(widths.median())
        if middle > 0:
            worst.append(float(widths.max()) / middle)
    return max(worst, default=None)


def _weights(quantized: Quantized, node: fx.Node) -> dict[str, Any]:
    module = module_of(quantized.gm, node)
    weight: Tensor = module.weight.detach()
    if isinstance(module, nn.ConvTranspose2d):
        weight = weight.transpose(0, 1)
    rows = weight.flatten(1)
    scale = quantized.calibration.weights.get(node.name)
    limits = None if scale is None else (127 * scale.detach().flatten()).tolist()
    if limits is not None:
        pairs = [[-_short(v), _short(v)] for v in limits]
        limits = pairs[0] if len(pairs) == 1 else pairs
    return {
        "name": node.name,
        "low": [_short(v) for v in rows.amin(1).tolist()],
        "high": [_short(v) for v in rows.amax(1).tolist()],
        "limits": limits,
    }


def _activation(quantized: Quantized, node: fx.Node | None) -> dict[str, Any] | None:
    stats = None if node is None else quantized.calibration.stats.get(node.name)
    if node is None or stats is None:
        return None
    owner = annotation(node).range_of
    limits = quantized.calibration.values.get(owner)
    return {
        "name": node.name,
        "low": [_short(v) for v in stats.channel_low.flatten().tolist()],
        "high": [_short(v) for v in stats.channel_high.flatten().tolist()],
        "limits": None if limits is None else [_short(v) for v in limits],
    }


def _written(quantized: Quantized, node: fx.Node) -> fx.Node | None:
    """The first value behind a layer that exists in int8: that of the activation fused with it, if there is one."""
    here = node
    while annotation(here).output is None and len(here.users) == 1:
        (here,) = here.users
        if here.op == "output":
            return node
    return here


def _size(module: Any) -> str:
    if isinstance(module, nn.Linear):
        return f"{module.in_features} to {module.out_features}"
    size = (
        f"{module.in_channels} to {module.out_channels}, {'x'.join(map(str, module.kernel_size))}"
    )
    if any(s > 1 for s in module.stride):
        size += f", stride {max(module.stride)}"
    if 1 < module.groups < module.in_channels:
        size += f", {module.groups} groups"
    return size


def _short(number: float) -> float:
    return float(f"{number:.4g}")
