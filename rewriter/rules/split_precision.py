"""One value in 16 bits, as two int8 tensors.

Before: x -> Q8 -> layer -> y
After:  x -> hi = s round(x / s) -> layer --> + -> y
        x - hi = lo -> layer without bias -^

    layer(x) = layer(hi) + layer(lo)      |lo| <= s / 2, in steps of s / 255: 65,000 levels in all

hi lies on its own int8 grid (``facts.GRID``: its scale and zero point are part of the plan, whatever
calibration would say), so nothing of it is rounded. x must be there in float: the network's
input, what a float operation makes (a layer norm), a sum or an activation, which then runs in
float, or a layer whose kernel can write floats on the target.

Why: for values that neither scaling nor splitting by channel repairs: inputs of a stem, what a
    layer norm makes, a residual trunk. Where a target has 16-bit values (``keep_int16``) it takes
    2.7 to 5 times the time of int8 on the devices that publish both; this is int8 alone.
Exact: yes.
Cost: the MACs of the layers that read the value once more, four float operations on the value and an
    addition at each of those layers.
Source: decomposition of 16-bit operands into two 8-bit ones, as for layer norms in Hailo's compiler
    (bit_decomposition_mode=split_precision).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import fx, nn

from rewriter.graph import facts
from rewriter.graph.channel_ranges import width
from rewriter.graph.edit import add_module
from rewriter.graph.lookup import find, is_call, module_of
from rewriter.graph.ops import ACTIVATION_TYPES, LAYER_TYPES, row_of
from rewriter.int8.annotate import is_decoding, is_layer, moves_values, notes_of
from rewriter.int8.scheme import QuantScheme
from rewriter.rules._rule import Contract, RewriteRule, Site, mark

# The power of the rounding error against that of the channels (of their ranges, in units of what even ones
# would have) from which a second half is offered.
LEAST_UNEVEN = 4.0
_READERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


class SplitPrecision(RewriteRule):
    """One site for each value that layers read in int8 and that is there in float, at the value."""

    name: ClassVar[str] = "split_precision"
    contract: ClassVar[Contract] = "exact"
    stage: ClassVar[Literal["replace", "split", "thin", "resize"]] = "split"

    def match(self, gm: fx.GraphModule) -> Iterator[Site]:
        scheme: QuantScheme | None = facts.SCHEME.get(gm)
        if scheme is None:
            return
        notes = notes_of(gm, scheme)
        for node in gm.graph.nodes:
            readers = [
                u
                for u in node.users
                if is_call(gm, u, *_READERS)
                and node.name in notes[u].reads
                and not is_decoding(gm, u)
            ]
            if readers and not moves_values(gm, node):
                yield self.site(node, *readers, blocked=self._problem(gm, node, scheme))

    def _problem(self, gm: fx.GraphModule, node: fx.Node, scheme: QuantScheme) -> str:
        if facts.GRID.known(node):
            return "it is half of a value in 16 bits"
        maker = _maker(gm, node)
        row = row_of(type(module_of(gm, maker))) if is_layer(gm, maker) else None
        if row is not None and not facts.KEEP_FLOAT.get(maker):
            writes = scheme.name in row.float_output
            if not writes and (maker is node or _clips(gm, node)):
                return f"the kernel of {maker.name} writes int8 alone"
        known = facts.CHANNEL_RANGE.get(node)
        if known is None:
            return "no calibrated channel ranges"
        size = width(*known).double()
        uneven = float(size.max().square() / size.square().mean().clamp_min(1e-300))
        if uneven < LEAST_UNEVEN:
            return f"its channels use the range: {uneven:.1f} times the error of even ones"
        return ""

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        value = find(gm, site.anchor)
        scheme = facts.SCHEME.of(gm)
        low, high = facts.CHANNEL_RANGE.of(value)
        scale, zero_point = scheme.activations.params(float(low.min()), float(high.max()))
        if value.op != "placeholder" and not is_layer(gm, value):
            facts.KEEP_FLOAT.put(value, True)  # else it would be rounded by its own kernel
            facts.READS_FLOAT.put(value, True)
        readers = [find(gm, name) for name in site.nodes[1:]]
        first, rest = _halves(gm, value, scale, site)
        facts.GRID.put(first, (scale, zero_point))
        for half in (first, rest):
            facts.CHANNEL_RANGE.drop(half)
        facts.CHANNEL_RANGE.put(first, (low, high))
        step = torch.full_like(low, scale / 2)
        facts.CHANNEL_RANGE.put(rest, (-step, step))
        for reader in readers:
            _read_twice(gm, reader, value, first, rest, site)


def _maker(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The layer behind which an activation stands, or the node itself."""
    source = node.args[0] if node.args else None
    behind = is_call(gm, node, *ACTIVATION_TYPES) and isinstance(source, fx.Node)
    return source if behind and is_call(gm, source, *LAYER_TYPES) else node  # type: ignore[return-value]


def _clips(gm: fx.GraphModule, node: fx.Node) -> bool:
    row = row_of(type(module_of(gm, node))) if node.op == "call_module" else None
    return row is not None and row.clips


def _halves(
    gm: fx.GraphModule, value: fx.Node, scale: float, site: Site
) -> tuple[fx.Node, fx.Node]:
    """The value rounded to whole steps, and what is left over, both computed in float."""
    with gm.graph.inserting_after(value):
        steps = gm.graph.call_function(operator.mul, (value, 1 / scale))
    with gm.graph.inserting_after(steps):
        whole = gm.graph.call_function(torch.round, (steps,))
    with gm.graph.inserting_after(whole):
        first = gm.graph.call_function(operator.mul, (whole, scale))
    with gm.graph.inserting_after(first):
        rest = gm.graph.call_function(operator.sub, (value, first))
    for new in (steps, whole, first, rest):
        facts.inherit(new, value)
        facts.KEEP_FLOAT.put(new, True)
        facts.READS_FLOAT.put(new, True)
        mark(new, site)
    return first, rest


def _read_twice(
    gm: fx.GraphModule,
    reader: fx.Node,
    value: fx.Node,
    first: fx.Node,
    rest: fx.Node,
    site: Site,
) -> None:
    """Edit gm: a layer reads both halves, each by itself, and the results are added."""
    second = copy.deepcopy(module_of(gm, reader))
    second.bias = None
    users = list(reader.users)
    reader.replace_input_with(value, first)
    with gm.graph.inserting_after(reader):
        path = add_module(gm, f"{reader.target}_rest", second)
        other = gm.graph.call_module(path, (rest,))
    with gm.graph.inserting_after(other):
        total = gm.graph.call_function(operator.add, (reader, other))
    for new in (other, total):
        facts.inherit(new, reader)
    facts.CHANNEL_RANGE.drop(other)
    for new in (reader, other, total):
        mark(new, site)
    for user in users:
        user.replace_input_with(reader, total)
