"""Hidden channels that hold one number whatever the input, and what the layer after them makes of it.

A filter whose weights are nothing makes its bias everywhere. What lies behind keeps it one number (activations, batch norm,
pooling), or does not: zero padding puts other numbers at the border. Nothing is guessed from calibration inputs but how
large the inputs of a filter are, so that weights below the rounding of float32 count as none.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph.channel_ranges import range_of
from rewriter.graph.lookup import is_call, module_of
from rewriter.graph.ops import ACTIVATION_TYPES
from rewriter.surgery.hidden_channels import Hidden

# A filter that moves its result by less than this share of what the layer's largest does is lost in rounding.
NOTHING = 1e-8
_KEEPING = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample)


def dead_channels(gm: fx.GraphModule, hidden: Hidden) -> Tensor:
    """Numbers of the hidden channels that can go without a change of the function, whole units only.

    Args:
        gm: canonical graph.
        hidden: of ``rewriter.surgery.hidden_channels``, not blocked.
    """
    known = constants(gm, hidden)
    last = known[_read_by(hidden)]
    assert hidden.reader is not None
    reader = module_of(gm, hidden.reader)
    columns = _columns(reader, hidden)
    unread = (
        columns.flatten(1).abs().sum(1) == 0 if hidden.axis == 1 else columns.abs().sum(1) == 0
    )
    dead = ~last.isnan() if _reads_evenly(reader) else last == 0
    if hidden.gates:  # a squeeze reads them too, before the gate
        for gate in hidden.gates:
            dead &= ~known[_source(gate.squeeze)].isnan()
    else:
        dead |= unread
    units = dead.view(-1, hidden.unit).all(1)
    numbers = units.nonzero().flatten()[:, None] * hidden.unit + torch.arange(hidden.unit)
    return numbers.flatten()


def fold_constants(gm: fx.GraphModule, hidden: Hidden, dead: Tensor) -> None:
    """Add to the biases of the layers that read some dead channels what they make of them, in place."""
    known = constants(gm, hidden)
    assert hidden.reader is not None
    reader = module_of(gm, hidden.reader)
    _add(reader, _columns(reader, hidden)[dead], known[_read_by(hidden)][dead].nan_to_num())
    for gate in hidden.gates:
        layer = module_of(gm, gate.squeeze)
        columns = layer.weight.detach().double().transpose(0, 1)
        _add(layer, columns[dead], known[_source(gate.squeeze)][dead])


def constants(gm: fx.GraphModule, hidden: Hidden) -> dict[fx.Node, Tensor]:
    """(C,) the number that each hidden channel holds in each value; NaN where it is not one."""
    entry = module_of(gm, hidden.entry)
    found = {hidden.entry: _made(gm, hidden.entry, entry)}
    expands = {g.expand for g in hidden.gates}
    places = {n: i for i, n in enumerate(gm.graph.nodes)}
    for node in sorted([*hidden.inside, *(n for n, _ in hidden.joined)], key=places.__getitem__):
        if node in expands:
            found[node] = _made(gm, node, module_of(gm, node))
            continue
        sources = [found[s] for s in node.all_input_nodes if s in found]
        wide = any(node is n for n, _ in hidden.joined)
        found[node] = _after(gm, node, sources, wide) if sources else _unknown(hidden)
    return found


def _unknown(hidden: Hidden) -> Tensor:
    return torch.full((hidden.channels,), torch.nan, dtype=torch.float64)


def _made(gm: fx.GraphModule, node: fx.Node, layer: Any) -> Tensor:
    """The bias of each filter that reads nothing."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    weight = layer.weight.detach().double().abs()
    groups = getattr(layer, "groups", 1)
    seen = range_of(source, weight.shape[1] * groups)
    if seen is not None:
        size = torch.maximum(seen[0].abs(), seen[1].abs()).double().cpu()
        size = size.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1)
        weight = weight * size.view(*size.shape, *[1] * (weight.ndim - 2))
    reach = weight.flatten(1).sum(1)
    bias = torch.zeros_like(reach) if layer.bias is None else layer.bias.detach().double()
    dead = (reach <= NOTHING * reach.max()) | (layer.weight.detach().flatten(1).abs().sum(1) == 0)
    return torch.where(dead, bias, torch.nan)


def _after(gm: fx.GraphModule, node: fx.Node, sources: list[Tensor], wide: bool) -> Tensor:
    """What an operation makes of channels that are constant."""
    (first, *rest) = sources
    nothing = torch.full_like(first, torch.nan)
    if is_call(gm, node, *ACTIVATION_TYPES, nn.BatchNorm2d):
        m = module_of(gm, node)
        if wide and isinstance(m, (nn.BatchNorm2d, nn.PReLU)):
            return nothing
        flat = first.view(1, -1, 1, 1).to(_dtype(m))
        with torch.no_grad():
            return m(flat).double().flatten()
    if is_call(gm, node, nn.Conv2d):
        return nothing if wide else _depthwise(gm, node, first)
    if is_call(gm, node, *_KEEPING):
        return first
    if is_call(gm, node, nn.AvgPool2d):
        m = module_of(gm, node)
        even = not m.count_include_pad or not torch.as_tensor(m.padding).any()
        return first if even else torch.where(first == 0, first, nothing)
    if is_call(gm, node, nn.ZeroPad2d):
        return torch.where(first == 0, first, nothing)
    if node.target in (torch.cat, torch.mean, torch.flatten):
        return first
    if node.target is operator.mul and len(node.all_input_nodes) == 2:
        other = rest[0] if rest else nothing
        zero = (first == 0) | (other == 0)
        return torch.where(zero, 0.0, first * other)
    if node.target is operator.add and len(rest) == 1:
        return first + rest[0]
    return nothing


def _depthwise(gm: fx.GraphModule, node: fx.Node, value: Tensor) -> Tensor:
    m = module_of(gm, node)
    if m.groups != len(value) or m.out_channels != len(value):
        return torch.full_like(value, torch.nan)
    weight = m.weight.detach().double().flatten(1)
    bias = torch.zeros_like(value) if m.bias is None else m.bias.detach().double()
    made = torch.where(weight.abs().sum(1) == 0, bias, value * weight.sum(1) + bias)
    even = _reads_evenly(m) | (value == 0) | (weight.abs().sum(1) == 0)
    return torch.where(torch.as_tensor(even), made, torch.nan)


def _reads_evenly(m: Any) -> bool:
    """Whether a layer multiplies every position alike: no zeros at the border."""
    if isinstance(m, nn.Linear) or m.padding_mode != "zeros" or m.padding == "valid":
        return True
    if m.padding == "same":
        return all(k == 1 for k in m.kernel_size)
    return not any(m.padding)


def _dtype(m: nn.Module) -> torch.dtype:
    tensor = next(iter([*m.parameters(), *m.buffers()]), None)
    return torch.float64 if tensor is None else tensor.dtype


def _source(node: fx.Node) -> fx.Node:
    (source,) = node.all_input_nodes
    return source


def _read_by(hidden: Hidden) -> fx.Node:
    assert hidden.reader is not None
    return _source(hidden.reader)


def _columns(reader: Any, hidden: Hidden) -> Tensor:
    """(C, O, ...) the reader's weights of the hidden channels."""
    weight = reader.weight.detach().double()
    return weight[:, hidden.offset : hidden.offset + hidden.channels].transpose(0, 1)


def _add(layer: Any, columns: Tensor, values: Tensor) -> None:
    """Add what a layer makes of constants (k,) through ``columns`` (k, O, ...) to its bias, in place."""
    added = (columns.flatten(2).sum(2) if columns.ndim > 2 else columns) * values[:, None]
    bias = 0.0 if layer.bias is None else layer.bias.detach().double()
    made = (bias + added.sum(0)).to(layer.weight.dtype)
    layer.bias = nn.Parameter(made, requires_grad=False)
