"""What repairs and equalization go by, measured of a float network and kept: ranges of channels, influences of values and weights.

They depend on the network and the inputs alone. An exact step leaves them as they are but for the values that it makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, fx

from rewriter.damage.fisher import INPUTS as ALL
from rewriter.damage.fisher import weigh
from rewriter.damage.grouping import fidelity_of
from rewriter.graph import facts
from rewriter.graph.channel_ranges import input_marks, profile, weight_mark
from rewriter.storage.cache import Store, load, save_to
from rewriter.storage.digest import data_digest, graph_digest, key

Batches = Sequence[Tensor | tuple[Tensor, ...]]
# Raised when what is measured comes out differently, so that stored results are not reused.
VERSION = 8
_ENDS: dict[str, tuple[str, ...]] = {
    "channel_range": ("low", "high"),
    "influence": ("",),
    "weight_influence": ("",),
}
MEASURED = tuple(_ENDS)
# Inputs that the influence of a rewritten network's values is measured on; that of the network as it is, once, on more.
INPUTS = 24
# The same of those few nodes that an exact step has made.
FEW = 8


def measure(gm: fx.GraphModule, batches: Batches, store: Store | None, again: bool) -> None:
    """Write ranges and influences into the meta of a graph; those of the values before a rewrite are not those after it.

    They depend on the float network alone: a plan that adds layers in float finds those of the plan without.
    """
    if not again and any(facts.INFLUENCE.known(n) for n in gm.graph.nodes):
        return
    what = MEASURED if again else MEASURED[1:]  # the ranges of the network as it is are given
    name, found = "", None
    if store is not None:
        kind = f"{VERSION} {what} {fidelity_of(gm, batches).digest}"
        name = key(["measured", graph_digest(gm), data_digest(batches), kind])
        found = load(store, name)
    if found is None:
        if again:
            _forget(gm, what)
            facts.PROFILED.drop(gm)
            profile(gm, batches)
        weigh(gm, batches, INPUTS if again else ALL)
        if store is not None:
            save_to(store, name, _measured(gm, what), {})
        return
    _forget(gm, what)
    if again:
        facts.PROFILED.put(gm, (weight_mark(gm), *input_marks(batches)))
    _recall(gm.graph.nodes, found[0], what)


def _recall(nodes: Iterable[fx.Node], found: Mapping[str, Tensor], what: tuple[str, ...]) -> None:
    """The inverse of ``_measured``, in place."""
    for node in nodes:
        for known in what:
            parts = [f"{known}.{end}.{node.name}" for end in _ENDS[known]]
            if parts[0] in found:
                values = [found[part] for part in parts]
                facts.named(known).put(node, tuple(values) if len(values) > 1 else values[0])


def changed_nodes(base: fx.GraphModule, gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that steps have made or changed."""
    known = {n.name: n for n in gm.graph.nodes}
    return [
        n
        for n in base.graph.nodes
        if n.name not in known
        or facts.REWRITTEN_BY.get(n) != facts.REWRITTEN_BY.get(known[n.name])
    ]


def measure_changed(
    base: fx.GraphModule, gm: fx.GraphModule, batches: Batches, store: Store | None
) -> None:
    """Write ranges and influences of what exact steps have made into the meta; all other nodes keep those of the network as it is.

    Args:
        base: what the steps made of a measured network; it is edited.
        gm: that network.
        batches: calibration inputs.
        store: where what is measured is kept; None: nowhere.
    """
    known = {n.name: n for n in gm.graph.nodes}
    changed = set(changed_nodes(base, gm))
    for node in base.graph.nodes:  # where a rule has dropped what was known, the value is another
        if node not in changed and not facts.CHANNEL_RANGE.known(node):
            changed |= {node} if facts.CHANNEL_RANGE.known(known[node.name]) else set()
    for node in changed:
        for fact in map(facts.named, MEASURED):
            fact.drop(node)
    if not changed:
        return
    name, found = "", None
    if store is not None:
        kind = f"{VERSION} changed {fidelity_of(base, batches).digest}"
        name = key(["measured", graph_digest(base), graph_digest(gm), data_digest(batches), kind])
        found = load(store, name)
    if found is None:
        profile(base, batches, changed)
        weigh(base, batches, FEW, only=changed)
        if store is not None:
            save_to(store, name, _measured(base, MEASURED, changed), {})
        return
    facts.PROFILED.put(base, (weight_mark(base), *input_marks(batches)))
    _recall(changed, found[0], MEASURED)


def _forget(gm: fx.GraphModule, what: tuple[str, ...]) -> None:
    for node in gm.graph.nodes:
        for known in what:
            facts.named(known).drop(node)


def _measured(
    gm: fx.GraphModule, what: tuple[str, ...], nodes: Iterable[fx.Node] | None = None
) -> dict[str, Tensor]:
    """What was measured of a graph, by kind, part and node."""
    tensors: dict[str, Tensor] = {}
    for node in gm.graph.nodes if nodes is None else nodes:
        for known in what:
            value = facts.named(known).get(node)
            if value is not None:
                parts = value if isinstance(value, tuple) else (value,)
                for end, part in zip(_ENDS[known], parts, strict=True):
                    tensors[f"{known}.{end}.{node.name}"] = part
    return tensors
