"""Where the numbers of an output come from: which layer's channel made each, and through which operations it went since.

The channel axis of an output cannot be told from its shape: a head may return (N, C, H, W), (N, positions, C), or
(N, positions) with one channel, and a shape such as (N, 400, 6) says nothing. The graph knows. Every number is given an
identity, "channel c of layer l"; operations that move values are carried out on the identities, operations on single
values append themselves, and what arrives at the output is read off.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional

from rewriter.graph import facts
from rewriter.graph.lookup import module_of, outputs
from rewriter.graph.ops import LAYER_TYPES

SQUASHES: dict[Any, str] = {
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "sigmoid",
    nn.Softmax: "softmax",
    nn.LogSoftmax: "log_softmax",
    torch.sigmoid: "sigmoid",
    functional.sigmoid: "sigmoid",
    functional.hardsigmoid: "sigmoid",
    torch.softmax: "softmax",
    functional.softmax: "softmax",
    torch.log_softmax: "log_softmax",
    functional.log_softmax: "log_softmax",
    functional.normalize: "normalize",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "log_softmax": "log_softmax",
}
# what only moves values: carried out on the identities as it is
_MOVES: frozenset[Any] = frozenset(
    {
        *("reshape", "view", "permute", "transpose", "flatten", "contiguous", "chunk", "split"),
        *(
            "squeeze",
            "unsqueeze",
            "expand",
            "flip",
            "t",
            "movedim",
            "swapaxes",
            "repeat",
            "narrow",
        ),
        *("unbind", "unflatten", "index_select", "select", "clone", "detach", "float"),
        *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.chunk, torch.split),
        *(
            torch.squeeze,
            torch.unsqueeze,
            torch.cat,
            torch.stack,
            torch.index_select,
            torch.unbind,
        ),
        *(torch.movedim, torch.narrow, torch.select, torch.flip, operator.getitem),
        *(nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.ZeroPad2d, nn.PixelShuffle),
        *(nn.ChannelShuffle, functional.pad),
    }
)
# what mixes the positions of each channel
_POOLS = ("pool", "upsample", "interpolate")
# what torch raises where an operation does not fit the identities
_MISFITS = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)


@dataclass(frozen=True)
class Origin:
    """What the graph says about one output.

    Args:
        axis: of the channels in (N, ...); 0 where all numbers are of one channel.
        channel: for each entry along that axis, a number that is the same for entries of the same channels.
        path: the same for entries that went through the same operations after their layers.
        ends: for each entry, the last operation that made it: ``sigmoid``, ``softmax``, ``log_softmax``, ``normalize`` or "".
    """

    axis: int
    channel: tuple[int, ...]
    path: tuple[int, ...]
    ends: tuple[str, ...]


@dataclass
class _Table:
    """All identities: which channel each is of, and the operations since."""

    channel: list[int] = field(default_factory=lambda: [0])
    path: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    end: list[str] = field(default_factory=lambda: [""])
    _known: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    _channels: int = 0

    def channels(self, count: int) -> Tensor:
        """(count,) identities of the channels of a layer."""
        first = len(self.channel)
        self.channel += range(self._channels + 1, self._channels + count + 1)
        self._channels += count
        self.path += [()] * count
        self.end += [""] * count
        return torch.arange(first, first + count, dtype=torch.float64)

    def after(self, identities: Tensor, step: int, end: str) -> Tensor:
        """Identities of the same numbers after the operation of one node."""
        old, place = identities.unique(return_inverse=True)
        new = [self._next(int(i), step, end) for i in old.tolist()]
        return torch.tensor(new, dtype=torch.float64)[place]

    def _next(self, i: int, step: int, end: str) -> int:
        if i == 0:
            return 0
        if (i, step) not in self._known:
            self._known[i, step] = len(self.channel)
            self.channel.append(self.channel[i])
            self.path.append((*self.path[i], step))
            self.end.append(end)
        return self._known[i, step]


def origins(gm: fx.GraphModule) -> list[Origin]:
    """Where each flat output of a canonical graph comes from; nothing is run but moves of small arrays."""
    table = _Table()
    values: dict[fx.Node, Any] = {}
    for step, node in enumerate(gm.graph.nodes):
        if node.op != "output":
            values[node] = _identities(gm, node, step, values, table)
    return [_origin(values[node], node, table) for node in outputs(gm)]


def _identities(
    gm: fx.GraphModule, node: fx.Node, step: int, values: dict[fx.Node, Any], table: _Table
) -> Any:
    """The identities of the numbers of a value (1, ...); None where it has no shape."""
    if node.op == "get_attr":
        return None
    what: Any = type(module_of(gm, node)) if node.op == "call_module" else node.target
    shape = facts.SHAPE.get(node)
    if what in _MOVES:
        try:
            return _moved(gm, node, values)
        except _MISFITS:
            pass  # a form of it that cannot be followed is like any other operation
    if not isinstance(shape, tuple) or any(not isinstance(s, int) for s in shape):
        return None
    name = getattr(what, "__name__", str(what)).lower()
    if what not in LAYER_TYPES and not any(word in name for word in _POOLS):
        same = next((v for v in _read(node, values) if tuple(v.shape) == shape), None)
        if same is not None:
            return table.after(same, step, _end(node, what))
    return _fresh(what, shape, table)


def _moved(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def known(n: fx.Node) -> Any:
        if n.op == "get_attr":
            return operator.attrgetter(str(n.target))(gm) if "index" in str(node.target) else None
        return values[n]

    def filled(n: fx.Node) -> Any:
        found = known(n)
        # a constant beside others, such as in a concatenation
        return torch.zeros(facts.SHAPE.of(n), dtype=torch.float64) if found is None else found

    args, kwargs = map_arg(node.args, filled), map_arg(node.kwargs, filled)
    if node.op == "call_module":
        return module_of(gm, node)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs).double()
    operation: Callable[..., Any] = node.target  # type: ignore[assignment]
    return operation(*args, **kwargs)


def _read(node: fx.Node, values: dict[fx.Node, Any]) -> list[Tensor]:
    return [values[n] for n in node.all_input_nodes if isinstance(values.get(n), Tensor)]


def _end(node: fx.Node, what: Any) -> str:
    if what is operator.truediv or what is torch.div:
        divisor = node.args[1]
        if isinstance(divisor, fx.Node) and any("norm" in n.name for n in _upwards(divisor)):
            return "normalize"
    return SQUASHES.get(what, "")


def _upwards(node: fx.Node) -> Sequence[fx.Node]:
    """A divisor and what it was made from, through a bound from below."""
    return (node, *node.all_input_nodes[:1])


def _fresh(what: Any, shape: tuple[int, ...], table: _Table) -> Tensor | None:
    """Identities of a value that was made anew: one for each channel."""
    if len(shape) < 2:
        return None
    last = what is nn.Linear or (len(shape) == 3 and what not in LAYER_TYPES)
    axis = len(shape) - 1 if last else 1
    wide = [1] * len(shape)
    wide[axis] = shape[axis]
    return table.channels(shape[axis]).view(wide).expand(shape).clone()


def _origin(identities: Any, node: fx.Node, table: _Table) -> Origin:
    shape = facts.SHAPE.get(node)
    if not isinstance(identities, Tensor) and isinstance(shape, tuple):
        identities = _fresh(None, shape, table)
    if not isinstance(identities, Tensor) or identities.ndim < 2:
        return Origin(0, (0,), (0,), ("",))
    ids = identities.long()
    channel = torch.tensor(table.channel)[ids]
    axis = _channel_axis(channel)
    rows = ids.movedim(axis, 0).flatten(1) if axis else ids.reshape(1, -1)
    entries = [sorted(set(row.tolist())) for row in rows]
    return Origin(
        axis,
        _numbered([tuple(sorted({table.channel[i] for i in some})) for some in entries]),
        _numbered([tuple(sorted({table.path[i] for i in some})) for some in entries]),
        tuple(_common([table.end[i] for i in some if i]) for some in entries),
    )


def _channel_axis(channel: Tensor) -> int:
    """The axis along which the channel changes most steadily; 0 where it never does.

    Of equals the last: (N, positions, C) is what a head that was laid out by hand looks like.
    """
    best, most = 0, 0.0
    for axis in range(1, channel.ndim):
        if channel.shape[axis] > 1:
            changes = channel.diff(dim=axis).ne(0).double().mean()
            if float(changes) > 0 and float(changes) >= most:
                best, most = axis, float(changes)
    return best


def _numbered(keys: list[Any]) -> tuple[int, ...]:
    number = {k: i for i, k in enumerate(dict.fromkeys(keys))}
    return tuple(number[k] for k in keys)


def _common(ends: list[str]) -> str:
    found = set(ends)
    return found.pop() if len(found) == 1 else ""
