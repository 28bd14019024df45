"""Channels between two dense layers that nothing else sees, and how to take some of them away.

A dense layer (the *entry*) makes them, channel-wise operations (activations, depthwise layers,
pooling, gates of squeeze and excitation) change each of them alone, and one dense layer (the
*reader*) reads them, by themselves or concatenated with others:

    entry -> [activation] -> [depthwise k x k] -> [gate] -> [cat] -> reader

Without channel c the entry loses row c of its weight, each channel-wise layer its filter c, and
the reader column c; no other value of the network changes its shape. A grouped convolution in
between ties the channels of a group together: only whole groups can go.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph import facts
from rewriter.graph.lookup import is_call, module_of
from rewriter.graph.ops import ACTIVATION_TYPES
from rewriter.surgery.channel_component import keeps_channels

# what a squeeze and its expansion may have between them
_BETWEEN = (*ACTIVATION_TYPES, nn.BatchNorm2d, nn.Identity)


@dataclass(frozen=True)
class Gate:
    """Squeeze and excitation on hidden channels: both of its dense layers."""

    squeeze: fx.Node
    expand: fx.Node


@dataclass
class Hidden:
    """Channels that one dense layer makes and one reads.

    Attributes:
        entry: The layer that makes them.
        channels: How many there are.
        axis: Of the values, on which they lie.
        unit: So many neighboring channels can only go together.
        inside: Channel-wise operations on them, in graph order.
        gates: Squeezes and excitations among those.
        joined: Values in which they lie beside others, and the first position that they have.
        reader: The layer that reads them; None where there is none.
        offset: Of the channels in what the reader reads.
        blocked: Why none of them can go, "" if some can.
    """

    entry: fx.Node
    channels: int
    axis: int
    unit: int = 1
    inside: list[fx.Node] = field(default_factory=list[fx.Node])
    gates: list[Gate] = field(default_factory=list[Gate])
    joined: list[tuple[fx.Node, int]] = field(default_factory=list[tuple[fx.Node, int]])
    reader: fx.Node | None = None
    offset: int = 0
    blocked: str = ""

    def values(self) -> list[fx.Node]:
        """The nodes whose values are the channels alone, in graph order."""
        return [self.entry, *self.inside]


def hidden_channels(gm: fx.GraphModule) -> Iterator[Hidden]:
    """What each dense layer makes, in graph order; ``blocked`` where it is no hidden value."""
    for node in gm.graph.nodes:
        if is_dense(gm, node):
            yield hidden_of(gm, node)


def is_dense(gm: fx.GraphModule, node: Any) -> bool:
    """Whether every output channel of a layer reads every input channel."""
    if is_call(gm, node, nn.Linear):
        return True
    return is_call(gm, node, nn.Conv2d) and module_of(gm, node).groups == 1


def hidden_of(gm: fx.GraphModule, entry: fx.Node) -> Hidden:
    """The channels that a dense layer makes."""
    layer = module_of(gm, entry)
    linear = isinstance(layer, nn.Linear)
    axis = len(facts.SHAPE.of(entry)) - 1 if linear else 1
    found = Hidden(entry, layer.out_features if linear else layer.out_channels, axis)
    readers: list[tuple[fx.Node, int]] = []
    places: dict[fx.Node, int] = {entry: 0}  # where the channels start in each value
    queue = [entry]

    def join(node: fx.Node, offset: int) -> None:
        if node not in places:
            places[node] = offset
            queue.append(node)

    while queue and not found.blocked:
        value = queue.pop()
        for user in value.users:
            if user.op == "output":
                found.blocked = f"the network returns {value.name}"
            elif is_dense(gm, user):
                if (user, places[value]) not in readers:
                    readers.append((user, places[value]))
            elif _channel_wise(gm, user, value, axis):
                other = _other_operand(user, value)
                beside = facts.SHAPE.of(value)[axis] != found.channels
                if beside and (other is not None or _group_width(gm, user) > 1):
                    found.blocked = f"{user.name} ties them to the channels beside them"
                    break
                if other is not None and other not in places:
                    chain = _gate_of(gm, other, found)
                    if chain is None:
                        what = "added to" if user.target is operator.add else "combined with"
                        found.blocked = f"{value.name} is {what} {other.name}"
                        break
                    for node in chain:
                        join(node, 0)
                found.unit = math.lcm(found.unit, _group_width(gm, user))
                join(user, places[value])
            elif (before := _cat_offset(user, value, axis)) is not None:
                if found.gates:
                    found.blocked = f"{user.name} concatenates values that have a gate"
                join(user, before + places[value])
            else:
                found.blocked = f"{_said(gm, user)} reads {value.name}"
        if len(places) > 64:
            found.blocked = "too many operations read them"
    _settle(gm, found, places, readers)
    return found


def _settle(
    gm: fx.GraphModule,
    found: Hidden,
    places: dict[fx.Node, int],
    readers: list[tuple[fx.Node, int]],
) -> None:
    """Edit a finding: what is inside, who reads it, and whether something stands in the way."""
    wide = {n for n in places if facts.SHAPE.of(n)[found.axis] != found.channels}
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    expands = {g.expand for g in found.gates}
    ranked = sorted(places, key=order.__getitem__)
    found.inside = [n for n in ranked if n not in wide and n is not found.entry]
    found.joined = [(n, places[n]) for n in ranked if n in wide]
    squeezes = {g.squeeze for g in found.gates}
    readers = [r for r in readers if r[0] not in squeezes]
    if found.blocked:
        return
    if squeezes - {u for n in places for u in n.users}:
        found.blocked = "a gate on them reads something else"
    elif len(readers) != 1:
        names = ", ".join(sorted(r.name for r, _ in readers))
        found.blocked = (
            f"read by {len(readers)} layers: {names}" if readers else "nothing reads them"
        )
    elif any(n in wide and n in squeezes for n in places):
        found.blocked = "a gate reads them beside others"
    else:
        found.reader, found.offset = readers[0]
        found.blocked = _shared(gm, [*found.values(), *squeezes, *expands, found.reader])


def _shared(gm: fx.GraphModule, nodes: list[fx.Node]) -> str:
    """Which of some layers has weights that another call uses too."""
    calls = Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_module")
    owners = Counter(id(p) for m in gm.modules() for p in m.parameters(recurse=False))
    for node in nodes:
        if node.op != "call_module":
            continue
        tensors = list(module_of(gm, node).parameters(recurse=False))
        used = calls[str(node.target)]
        if (tensors and used > 1) or any(owners[id(p)] > 1 for p in tensors):
            return f"the weights of {node.name} are used elsewhere too"
    return ""


def _channel_wise(gm: fx.GraphModule, node: fx.Node, value: fx.Node, axis: int) -> bool:
    """Whether a reader of a value changes each of its channels (or groups of them) alone."""
    width = facts.SHAPE.of(value)[axis]
    if axis == 1 and _group_width(gm, node) > 1:
        return True
    if axis != 1:  # of tokens, whose channels lie last
        plain = is_call(gm, node, *(t for t in ACTIVATION_TYPES if t is not nn.PReLU))
        return plain and facts.SHAPE.of(node) == facts.SHAPE.of(value)
    return keeps_channels(gm, node, width)


def _group_width(gm: fx.GraphModule, node: fx.Node) -> int:
    """Channels of each group of a grouped convolution that has as many outputs as inputs; else 1."""
    if not is_call(gm, node, nn.Conv2d):
        return 1
    m = module_of(gm, node)
    return m.in_channels // m.groups if m.in_channels == m.out_channels and m.groups > 1 else 1


def _other_operand(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """The other value of as many channels that an operation on two of them reads."""
    others = [n for n in node.all_input_nodes if n is not value]
    return others[0] if others and facts.SHAPE.of(others[0])[1] > 1 else None


def _gate_of(gm: fx.GraphModule, node: fx.Node, found: Hidden) -> list[fx.Node] | None:
    """The channel-wise nodes from a gate's expansion to its product, None where it is no gate; edits found."""
    chain: list[fx.Node] = []
    while not is_dense(gm, node):
        if not is_call(gm, node, *_BETWEEN) or len(node.users) != 1:
            return None
        chain.append(node)
        (node,) = node.all_input_nodes
    expand, inner = node, node.args[0]
    while isinstance(inner, fx.Node) and not is_dense(gm, inner):
        if not is_call(gm, inner, *_BETWEEN) or len(inner.users) != 1:
            return None
        inner = inner.args[0]
    if not isinstance(inner, fx.Node) or len(inner.users) != 1 or len(expand.users) != 1:
        return None
    found.gates.append(Gate(inner, expand))
    return [expand, *reversed(chain)]


def _cat_offset(node: fx.Node, value: fx.Node, axis: int) -> int | None:
    """Channels before those of a value in a concatenation of channels; None where it is none."""
    if node.target is not torch.cat:
        return None
    parts: Any = node.args[0]
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    rank = len(facts.SHAPE.of(value))
    if not isinstance(dim, int) or dim % rank != axis or list(parts).count(value) != 1:
        return None
    before = list(parts)[: list(parts).index(value)]
    return sum(facts.SHAPE.of(n)[axis] for n in before)


def _said(gm: fx.GraphModule, node: fx.Node) -> str:
    kind = type(module_of(gm, node)).__name__ if node.op == "call_module" else node.op
    name = getattr(node.target, "__name__", "")
    return f"{node.name} ({name or kind})"


# ------------------------------------------------------------------------------ taking away


def keep_channels(gm: fx.GraphModule, hidden: Hidden, kept: Tensor) -> None:
    """Take all hidden channels away but those kept, in place: weights, shapes, ranges.

    Args:
        gm: The graph that ``hidden`` was found in; the caller recompiles.
        hidden: Where, not blocked.
        kept: (k,) numbers of the channels that stay, ascending; whole units.
    """
    assert hidden.reader is not None
    expands = {g.expand for g in hidden.gates}
    for node in (hidden.entry, *hidden.inside):
        if node.op == "call_module":
            dense = node is hidden.entry or node in expands
            _keep_outputs(module_of(gm, node), kept, hidden.channels, dense=dense)
        _keep_meta(node, kept, hidden.axis, hidden.channels)
    for gate in hidden.gates:
        _keep_inputs(module_of(gm, gate.squeeze), kept)
        _keep_read(gate.squeeze, kept)
    columns = kept_columns(gm, hidden, kept)
    for node, offset in hidden.joined:
        width = facts.SHAPE.of(node)[hidden.axis]
        left = _beside(kept, hidden.channels, offset, width)
        if node.op == "call_module":
            _keep_outputs(module_of(gm, node), left, width, dense=False)
        _keep_meta(node, left, hidden.axis, width)
    _keep_inputs(module_of(gm, hidden.reader), columns)
    _keep_read(hidden.reader, columns)


def kept_columns(gm: fx.GraphModule, hidden: Hidden, kept: Tensor) -> Tensor:
    """Numbers of the reader's input channels that are left, others' included."""
    assert hidden.reader is not None
    width = module_of(gm, hidden.reader).weight.shape[1]
    return _beside(kept, hidden.channels, hidden.offset, width)


def _beside(kept: Tensor, channels: int, offset: int, width: int) -> Tensor:
    before = torch.arange(offset)
    return torch.cat([before, kept.cpu() + offset, torch.arange(offset + channels, width)])


def _keep_outputs(m: nn.Module, kept: Tensor, channels: int, *, dense: bool) -> None:
    """Edit a layer: it makes the kept channels only (and reads only them, where it is not dense)."""
    if isinstance(m, nn.Conv2d) and not dense:
        m.groups = m.groups * len(kept) // channels
        m.in_channels = len(kept)
    for name, value in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]:
        if value.ndim and len(value) == channels:
            _set(m, name, value[kept.to(value.device)])
    for name in ("out_channels", "out_features", "num_features", "num_parameters"):
        if getattr(m, name, None) == channels:
            setattr(m, name, len(kept))


def _keep_inputs(m: nn.Module, columns: Tensor) -> None:
    """Edit a dense layer: it reads these channels only."""
    weight: Any = m.weight
    _set(m, "weight", weight[:, columns.to(weight.device)])
    setattr(m, "in_features" if isinstance(m, nn.Linear) else "in_channels", len(columns))


def _set(m: nn.Module, name: str, value: Tensor) -> None:
    value = value.detach().clone()
    if name in dict(m.named_buffers(recurse=False)):
        setattr(m, name, value)
    else:
        setattr(m, name, nn.Parameter(value, requires_grad=False))


def _keep_meta(node: fx.Node, kept: Tensor, axis: int, width: int) -> None:
    """Edit what is known of a value: its shape, and what was measured of each channel."""
    shape = list(facts.SHAPE.of(node))
    shape[axis] = len(kept)
    facts.SHAPE.put(node, tuple(shape))
    measured: tuple[facts.Fact[Any], ...] = (
        facts.CHANNEL_RANGE,
        facts.INFLUENCE,
        facts.WEIGHT_INFLUENCE,
    )
    for fact in measured:
        known = fact.get(node)
        if known is None:
            continue
        parts = known if isinstance(known, tuple) else (known,)
        if any(len(p) != width for p in parts):
            fact.drop(node)  # measured along another axis
            continue
        left = tuple(p[kept.to(p.device)] for p in parts)
        shortened: Any = left if isinstance(known, tuple) else left[0]
        fact.put(node, shortened)


def _keep_read(node: fx.Node, columns: Tensor) -> None:
    """Edit what is known of a reader's weights."""
    known = facts.WEIGHT_INFLUENCE.get(node)
    if isinstance(known, Tensor) and known.ndim == 2 and known.shape[1] > int(columns.max()):
        facts.WEIGHT_INFLUENCE.put(node, known[:, columns.to(known.device)])
