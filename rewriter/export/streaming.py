"""A network with recurrent layers for one chunk of frames at a time: states become inputs and outputs.

Before: scores = f(x), x (N, T, ...); each recurrent layer starts from zeros, or from what it is given
After:  scores, states = f(chunk, states)

States are batch first, (N, layers, hidden) of a layer and (N, hidden) of a cell, whatever the module wants inside,
so that the first dimension of everything is the batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rewriter.assemble import reassemble
from rewriter.errors import RewriteError
from rewriter.graph import facts
from rewriter.graph.edit import copy_graph
from rewriter.graph.interpret import propagate_shapes, walk
from rewriter.graph.lookup import module_of, outputs
from rewriter.graph.ops import RECURRENT_TYPES
from rewriter.int8.annotate import annotate
from rewriter.int8.simulate import Quantized
from rewriter.plan import Plan

_CELLS = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)


@dataclass(frozen=True)
class State:
    """One hidden state that is carried from chunk to chunk.

    Args:
        name: of the graph's input.
        initial: of one sequence, (layers, hidden) or (hidden,): what its first chunk starts from.
    """

    name: str
    initial: Tensor

    def start(self, batch: int) -> Tensor:
        """The state of ``batch`` sequences before their first frame."""
        return self.initial.expand(batch, *self.initial.shape)


@dataclass(frozen=True)
class Stream:
    """The float or int8 network of a chunk; its inputs are frames and states, its outputs scores and next states."""

    gm: fx.GraphModule
    states: tuple[State, ...]
    quantized: Quantized | None = None


def first_output_only(gm: fx.GraphModule) -> None:
    """Edit gm: return the scores and no states, which the streaming form adds by itself."""
    (output,) = gm.graph.find_nodes(op="output")
    scores, *rest = outputs(gm)
    if not rest:
        return
    output.args = (scores,)
    facts.STRUCTURE.put(gm, pytree.tree_structure(0))
    facts.CONSTANT_OUTPUTS.put(gm, {})
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()


def streaming(gm: fx.GraphModule) -> Stream:
    """The streaming form of a canonical graph that was traced for the frames of one chunk.

    Raises:
        RewriteError: nothing is recurrent, a layer runs backwards in time, or an opaque module hides one.
    """
    gm = copy_graph(gm)
    calls = _recurrent_calls(gm)
    initial = _initial_states(gm, calls)
    place = gm.graph.find_nodes(op="placeholder")[-1]
    count, (output,) = len(outputs(gm)), gm.graph.find_nodes(op="output")
    states: list[State] = []
    ends: list[fx.Node] = []
    for nodes in calls:
        cell = isinstance(module_of(gm, nodes[0]), _CELLS)
        starts: list[fx.Node] = []
        for letter, value in zip("hc", initial[nodes[0]], strict=False):
            with gm.graph.inserting_after(place):
                place = gm.graph.placeholder(f"{nodes[0].name}_{letter}")
            states.append(State(place.name, value))
            with gm.graph.inserting_before(nodes[0]):
                start = place if cell else gm.graph.call_method("transpose", (place, 0, 1))
            starts.append(start)
        given = starts[0] if len(starts) == 1 else tuple(starts)
        nodes[0].args, nodes[0].kwargs = (nodes[0].args[0], given), {}
        with gm.graph.inserting_before(output):
            ends += _last_states(gm, nodes[-1], len(starts), cell)
    output.args = ((*outputs(gm), *ends),)
    structure = pytree.tree_structure(tuple(range(count + len(ends))))
    facts.STRUCTURE.put(gm, structure)
    facts.CONSTANT_OUTPUTS.put(gm, {})
    facts.EXAMPLE.put(gm, (*facts.EXAMPLE.of(gm), *(tuple(s.initial.shape) for s in states)))
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    propagate_shapes(gm)
    return Stream(gm, tuple(states))


def streaming_int8(
    quantized: Quantized, plan: Plan, original: fx.GraphModule, chunk: fx.GraphModule
) -> Stream:
    """The streaming form of a quantized network: the same weights, scales and ranges.

    Args:
        quantized: the network of a plan, for whole sequences.
        plan: that plan.
        original: the profiled graph that it was made from.
        chunk: canonical graph of the float network, traced for the frames of one chunk.

    Raises:
        RewriteError: as for ``streaming``; or the graph of a chunk has other layers than that of a sequence.
    """
    stream = streaming(reassemble(quantized, plan, original, chunk))
    annotate(stream.gm, quantized.scheme)
    # slices of frames are numbered through, so the names of values depend on how many there are
    owners, known = _owners(stream.gm), _owners(quantized.gm)
    if len(owners) != len(known):
        raise RewriteError(
            f"streaming: int8 values: {len(owners)} in a chunk, {len(known)} in a whole sequence"
        )
    values = {o: quantized.calibration.values[k] for o, k in zip(owners, known, strict=True)}
    calibration = replace(quantized.calibration, values=values)
    made = Quantized(stream.gm, calibration, quantized.scheme)
    return Stream(stream.gm, stream.states, made)


def _owners(gm: fx.GraphModule) -> list[str]:
    """The values that have an int8 range of their own, in running order."""
    return [n.name for n in gm.graph.nodes if facts.INT8.of(n).range_of == n.name]


def run_stream(
    step: Callable[..., Sequence[Tensor]], x: Tensor, states: Sequence[State], chunk: int
) -> Tensor:
    """The scores of whole sequences, chunk by chunk with the states carried over.

    Args:
        step: (frames (N, chunk, ...), *states) -> [scores (N, chunk, ...), *next states].
        x: (N, T, ...) sequences; T is a multiple of ``chunk``.
        states: of the stream.
        chunk: frames in one step.

    Raises:
        RewriteError: T is no multiple of ``chunk``.
    """
    if x.shape[1] % chunk:
        raise RewriteError(
            f"streaming: frames: {x.shape[1]}, not a multiple of the chunk, {chunk}"
        )
    carried: Sequence[Tensor] = [s.start(len(x)) for s in states]
    found: list[Tensor] = []
    for frames in x.split(chunk, 1):
        scores, *carried = step(frames, *carried)
        found.append(scores)
    return torch.cat(found, 1)


def _recurrent_calls(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """The calls of each recurrent module, in running order."""
    calls: dict[int, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        m = module_of(gm, node)
        if type(m) in RECURRENT_TYPES:
            if getattr(m, "bidirectional", False):
                raise RewriteError(f"streaming: {node.target}: runs backwards in time too")
            calls.setdefault(id(m), []).append(node)
        elif any(isinstance(inner, RECURRENT_TYPES) for inner in m.modules()):
            raise RewriteError(
                f"streaming: {node.target}: hides a recurrent layer in an opaque part"
            )
    if not calls:
        raise RewriteError("streaming: network: no recurrent layer, so there is nothing to carry")
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    return [sorted(nodes, key=order.__getitem__) for nodes in calls.values()]


def _initial_states(
    gm: fx.GraphModule, calls: Sequence[Sequence[fx.Node]]
) -> dict[fx.Node, tuple[Tensor, ...]]:
    """What the first call of each module starts from, for one sequence."""
    given = {nodes[0]: _given(nodes[0]) for nodes in calls}
    wanted = {n for tree in given.values() for n in pytree.tree_leaves(tree) if n is not None}
    zeros = tuple(torch.zeros(1, *s) for s in facts.EXAMPLE.of(gm))
    with torch.no_grad():
        steps = walk(gm, zeros) if wanted else ()
        values: dict[fx.Node, Any] = {node: value for node, value in steps if node in wanted}
    found: dict[fx.Node, tuple[Tensor, ...]] = {}
    for node, tree in given.items():
        m = module_of(gm, node)
        cell, double = isinstance(m, _CELLS), isinstance(m, (nn.LSTM, nn.LSTMCell))
        if tree is None:
            shape = (m.hidden_size,) if cell else (m.num_layers, m.hidden_size)
            sizes = [shape] * (2 if double else 1)
            if getattr(m, "proj_size", 0):
                raise RewriteError(f"streaming: {node.target}: its hidden state is projected")
            found[node] = tuple(torch.zeros(size) for size in sizes)
        else:
            leaves = pytree.tree_leaves(pytree.tree_map(lambda n: values[n], tree))
            found[node] = tuple(v[0] if cell else v[:, 0] for v in leaves)
    return found


def _given(node: fx.Node) -> Any:
    state = node.args[1] if len(node.args) > 1 else node.kwargs.get("hx")
    return tuple(state) if isinstance(state, (list, tuple)) else state


def _last_states(gm: fx.GraphModule, node: fx.Node, count: int, cell: bool) -> Iterator[fx.Node]:
    """The states that a call leaves behind, batch first."""
    graph, pick = gm.graph, operator.getitem
    state = node if cell else graph.call_function(pick, (node, 1))
    for i in range(count):
        one = state if count == 1 else graph.call_function(pick, (state, i))
        yield one if cell else graph.call_method("transpose", (one, 0, 1))
