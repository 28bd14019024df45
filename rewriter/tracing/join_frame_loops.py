"""A network applied to every frame in a Python loop becomes one call on all frames.

Tracing unrolls ``[cnn(x[:, t]) for t in range(x.shape[1])]`` into one copy of the network for each frame. The copies
run in parallel lanes: each lane reads another slice of one tensor, or another step of one recurrent cell, and calls
the same modules in the same order. The frames are moved into the batch, the first lane is kept, and who read a lane
reads a slice of the result:

    x (N, T, ...) -> reshape (N * T, ...) -> one lane -> reshape (N, T, ...) -> [:, t]

So a layer stays one layer with one set of weights. Lanes that depend on each other (what is computed from the last
step goes into the next) are left alone, and so is everything whose result would differ.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from rewriter.graph import facts
from rewriter.graph.lookup import module_of
from rewriter.graph.ops import RECURRENT_TYPES
from rewriter.tracing.static_shapes import fix_sizes

Lane = tuple[fx.Node, ...]
TOLERANCE = 1e-4
_SHAPING = ("flatten", torch.flatten, "transpose", torch.transpose, "squeeze", torch.squeeze)


def join_loops(gm: fx.GraphModule, known: tuple[type[nn.Module], ...]) -> fx.GraphModule:
    """Return the graph with its parallel lanes joined; the same graph where there are none.

    Args:
        gm: freshly traced, with functions and modules already in the normal form.
        known: modules that work on each sample alone.
    """
    refused: set[str] = set()
    sized = False
    while True:
        found = next(_groups(gm, known, refused), None)
        if found is None:
            return gm
        if not sized:
            fix_sizes(gm)  # a reshape by sizes of the batch is then one by plain numbers
            gm.graph.eliminate_dead_code()
            sized = True
            continue
        target, calls = found
        refused.add(target)
        joined = _copied(gm)
        names = {n.name: n for n in joined.graph.nodes}
        _join(joined, tuple(names[c.name] for c in calls), known)
        if _same(gm, joined):
            gm = joined


def _groups(
    gm: fx.GraphModule, known: tuple[type[nn.Module], ...], refused: set[str]
) -> Iterator[tuple[str, Lane]]:
    """Calls of one module on frames of one sequence, none of which depends on another."""
    calls: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(module_of(gm, node), known):
            calls.setdefault(id(module_of(gm, node)), []).append(node)
    for nodes in calls.values():
        target = str(nodes[0].target)
        if len(nodes) < 2 or target in refused:
            continue
        roots = [n.args[0] for n in nodes]
        if _of_one_sequence(gm, roots) and not _dependent(nodes):
            yield target, tuple(nodes)


def _of_one_sequence(gm: fx.GraphModule, roots: Sequence[Any]) -> bool:
    if not all(isinstance(r, fx.Node) and facts.DTYPE.known(r) for r in roots):
        return False
    if len(set(roots)) < len(roots) or len({facts.SHAPE.of(r) for r in roots}) != 1:
        return False
    sources = {_sequence(gm, r) for r in roots}
    return len(sources) == 1 and sources != {None}


def _sequence(gm: fx.GraphModule, root: fx.Node) -> object:
    """What a frame is a frame of: a tensor that is sliced, or a recurrent cell."""
    if root.op == "call_module" and isinstance(module_of(gm, root), RECURRENT_TYPES):
        return module_of(gm, root)
    if root.target not in (operator.getitem, "select", torch.select):
        return None
    index: Any = root.args[1:]
    index = index[0] if root.target is operator.getitem else index
    picks = [i for i in (index if isinstance(index, tuple) else (index,)) if i != slice(None)]
    source = root.args[0]
    if not isinstance(source, fx.Node) or not all(isinstance(i, int) for i in picks):
        return None
    return _sequence(gm, source) or source


def _dependent(nodes: Sequence[fx.Node]) -> bool:
    """Whether one of the nodes reads what another one makes."""
    wanted, below = set(nodes), set[fx.Node]()
    for node in nodes[0].graph.nodes:
        if any(n in below or n in wanted for n in node.all_input_nodes):
            if node in wanted:
                return True
            below.add(node)
    return False


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    new = copy.deepcopy(gm)
    for a, b in zip(gm.graph.nodes, new.graph.nodes, strict=True):
        facts.inherit(b, a)
    facts.inherit(new, gm)
    return new


def _join(gm: fx.GraphModule, calls: Lane, known: tuple[type[nn.Module], ...]) -> None:
    """Join the lanes that start at ``calls``; edits gm."""
    roots: Lane = tuple(c.args[0] for c in calls)  # type: ignore[misc]
    lanes = _lanes(gm, roots, known)
    frames = _frames(gm, roots)
    first = dict(zip((lane[0] for lane in lanes), lanes, strict=True))
    inside = {n for lane in lanes for n in lane}
    last = frames
    for node in [n for n in gm.graph.nodes if n in first]:
        # the first lane becomes the one for all frames, behind what it reads
        node.replace_input_with(roots[0], frames)
        if not last < node:
            last.append(node)
        last = node
    for lane in lanes:
        readers = {u for n in lane for u in n.users if u not in inside}
        if readers:
            _hand_out(gm, lane, readers)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _lanes(gm: fx.GraphModule, roots: Lane, known: tuple[type[nn.Module], ...]) -> list[Lane]:
    """Everything that is computed alike in each lane, in running order."""
    member: dict[fx.Node, Lane] = dict.fromkeys(roots, roots)
    lanes: list[Lane] = []
    for node in gm.graph.nodes:
        mine = [n for n in node.all_input_nodes if n in member]
        if node in member or not mine or any(n is not member[n][0] for n in mine):
            continue
        others = [n for n in node.all_input_nodes if n not in member and n.op != "get_attr"]
        if others or not _frame_wise(gm, node, known):
            continue
        lane = _counterparts(gm, node, mine[0], member)
        if lane is not None:
            member.update(dict.fromkeys(lane, lane))
            lanes.append(lane)
    return lanes


def _frame_wise(gm: fx.GraphModule, node: fx.Node, known: tuple[type[nn.Module], ...]) -> bool:
    """Whether a node works on each sample alone, so that frames may be more samples."""
    if node.op == "call_module":
        return isinstance(module_of(gm, node), known)
    if node.op not in ("call_function", "call_method"):
        return False
    rest = (*node.args[1:], *node.kwargs.values())
    if node.op == "call_method" and node.target == "reshape":
        return len(rest) > 0 and bool(rest[0] == -1) and -1 not in rest[1:]
    if node.target in ("permute", torch.permute):
        order: Any = rest[0] if rest and isinstance(rest[0], (tuple, list)) else rest
        return len(order) > 0 and bool(order[0] == 0)
    if node.target is operator.getitem:
        return isinstance(rest[0], tuple) and bool(rest[0][0] == slice(None))
    joins = bool(node.args) and isinstance(node.args[0], (list, tuple))
    return not ((joins or node.target in _SHAPING) and (0 in rest or not rest))


def _counterparts(
    gm: fx.GraphModule, node: fx.Node, source: fx.Node, member: Mapping[fx.Node, Lane]
) -> Lane | None:
    """What the other lanes compute where the first one computes ``node``."""
    lane = [node]
    for t in range(1, len(member[source])):
        wanted = map_arg(
            (node.args, node.kwargs), lambda n, t=t: member[n][t] if n in member else n
        )
        found = next(
            (
                u
                for u in member[source][t].users
                if u not in member
                and (u.args, u.kwargs) == wanted
                and u.op == node.op
                and _alike(gm, u, node)
            ),
            None,
        )
        if found is None:
            return None
        lane.append(found)
    return tuple(lane)


def _alike(gm: fx.GraphModule, a: fx.Node, b: fx.Node) -> bool:
    if a.op != "call_module":
        return a.target == b.target
    one, other = module_of(gm, a), module_of(gm, b)
    if one is other:
        return True
    if type(one) is not type(other) or str(one) != str(other):
        return False
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def _frames(gm: fx.GraphModule, roots: Lane) -> fx.Node:
    """The roots of all lanes as one batch, (N * T, ...)."""
    batch, *shape = facts.SHAPE.of(roots[0])
    dtype = facts.DTYPE.of(roots[0])
    whole = _unsliced(roots)
    if whole is None:
        with gm.graph.inserting_after(max(roots)):
            whole = gm.graph.call_function(torch.stack, (list(roots), 1))
        facts.DTYPE.put(whole, dtype)
        facts.SHAPE.put(whole, (batch, len(roots), *shape))
    with gm.graph.inserting_after(whole):
        frames = gm.graph.call_method("reshape", (whole, -1, *shape))
    facts.DTYPE.put(frames, dtype)
    facts.SHAPE.put(frames, (batch * len(roots), *shape))
    return frames


def _unsliced(roots: Lane) -> fx.Node | None:
    """The tensor (N, T, ...) whose slices along the second dimension are the roots, all of them."""
    source: Any = roots[0].args[0]
    if any(r.target is not operator.getitem or r.args[0] is not source for r in roots):
        return None
    if source.target in ("unbind", torch.unbind):
        dim: Any = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
        source, every = source.args[0], list[Any](range(len(roots)))
        if dim != 1:
            return None
    else:
        every = [(slice(None), t) for t in range(len(roots))]
    complete = [r.args[1] for r in roots] == every
    shape = facts.SHAPE.get(source, ())
    return source if complete and len(shape) > 1 and shape[1] == len(roots) else None


def _hand_out(gm: fx.GraphModule, lane: Lane, readers: set[fx.Node]) -> None:
    """Give the readers of a lane their frames of the joined result."""
    joined, steps = lane[0], len(lane)
    batch, *shape = facts.SHAPE.of(joined)
    dtype = facts.DTYPE.get(joined, torch.float32)
    with gm.graph.inserting_after(joined):
        whole = gm.graph.call_method("reshape", (joined, -1, steps, *shape))
    facts.DTYPE.put(whole, dtype)
    facts.SHAPE.put(whole, (batch, steps, *shape))
    parts: list[fx.Node] = []
    with gm.graph.inserting_after(whole):
        for t in reversed(range(steps)):
            parts.insert(0, gm.graph.call_function(operator.getitem, (whole, (slice(None), t))))
            facts.DTYPE.put(parts[0], dtype)
            facts.SHAPE.put(parts[0], (batch, *shape))
    for reader in readers:
        dim = _collects(reader, lane)
        if dim is None:
            for node, part in zip(lane, parts, strict=True):
                reader.replace_input_with(node, part)
            continue
        new = whole
        with gm.graph.inserting_before(reader):
            if reader.target is torch.cat:
                new = gm.graph.call_method("reshape", (joined, -1, steps * shape[0], *shape[1:]))
            elif dim != 1:
                order = [i for i in range(len(shape) + 2) if i != 1]
                order.insert(dim, 1)
                new = gm.graph.call_method("permute", (whole, *order))
        if new is not whole:
            facts.DTYPE.put(new, dtype)
            facts.SHAPE.put(new, facts.SHAPE.get(reader))
        reader.replace_all_uses_with(new)


def _collects(reader: fx.Node, lane: Lane) -> int | None:
    """The dimension along which ``reader`` puts all frames together in their order."""
    given = reader.args[0] if reader.args else None
    if reader.target not in (torch.stack, torch.cat) or list(lane) != given:
        return None
    dim: Any = reader.args[1] if len(reader.args) > 1 else reader.kwargs.get("dim", 0)
    stacked = reader.target is torch.stack
    dim %= len(facts.SHAPE.of(lane[0])) + (1 if stacked else 0)
    return dim if stacked or dim == 1 else None


def _same(gm: fx.GraphModule, joined: fx.GraphModule) -> bool:
    """Whether both compute the same for a batch of three."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, *s, generator=generator) for s in facts.EXAMPLE.of(gm)]
    try:
        joined.graph.lint()
        gm.recompile()
        with torch.no_grad():
            found, expected = (
                [
                    v
                    for v in pytree.tree_leaves(m(*[x.clone() for x in inputs]))
                    if isinstance(v, Tensor)
                ]
                for m in (joined.eval(), gm.eval())
            )
    except Exception:  # not of the user's doing: the lanes only looked alike
        return False
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return False
        if not a.is_floating_point():
            continue
        scale = float(b.abs().max()) if math.prod(b.shape) else 0.0
        if not float((a - b).abs().max()) <= TOLERANCE * (scale or 1.0):
            return False
    return True
