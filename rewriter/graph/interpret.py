"""Run a graph node by node: shapes, values, and when a value is no longer needed."""

from __future__ import annotations

import operator
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from rewriter.graph import facts
from rewriter.graph.lookup import is_call, module_of
from rewriter.graph.ops import LAYER_TYPES, clip_bounds


@contextmanager
def without_fast_path() -> Generator[None]:
    """Inside, torch's attention computes step by step what its fused kernel does."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def propagate_shapes(gm: fx.GraphModule) -> None:
    """Write ``shape`` (batch 1) and ``dtype`` into every node's meta, by one pass over zeros."""

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            facts.SHAPE.put(
                n,
                pytree.tree_map(
                    lambda v: tuple(v.shape) if isinstance(v, Tensor) else None, value
                ),
            )
            if isinstance(value, Tensor):
                facts.SHAPE.put(n, tuple(value.shape))
                facts.DTYPE.put(n, value.dtype)
            return value

    kind = next((p.dtype for p in gm.parameters() if p.is_floating_point()), torch.float32)
    device = device_of(gm)
    zeros = [torch.zeros(1, *s, dtype=kind, device=device) for s in facts.EXAMPLE.of(gm)]
    with torch.no_grad():
        Shapes(gm).run(*zeros)


def last_uses(gm: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """The values that no node after this one reads, by node; a value that nobody reads dies where it is made."""
    last: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        last[node] = node
        for used in node.all_input_nodes:
            last[used] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for used, user in last.items():
        dying.setdefault(user, []).append(used)
    return dying


def device_of(gm: nn.Module) -> torch.device:
    """Where the weights of a network are, and so where it runs."""
    return next((p.device for p in gm.parameters()), torch.device("cpu"))


def clips_in_place(gm: fx.GraphModule) -> dict[fx.Node, tuple[float, float]]:
    """Activations that only clip what a layer makes for them alone, and where: nobody misses the value before."""
    found: dict[fx.Node, tuple[float, float]] = {}
    for node in gm.graph.nodes:
        source = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(source, fx.Node) or len(source.users) != 1 or node.kwargs:
            continue
        bounds = clip_bounds(module_of(gm, node))
        if bounds is not None and is_call(gm, source, *LAYER_TYPES):
            found[node] = bounds
    return found


def walk(
    gm: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    in_place: bool = False,
    only: Collection[fx.Node] | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Run the graph where its weights are; yield each node with its value, which is dropped after its last use.

    Args:
        gm: any graph.
        inputs: of one batch.
        in_place: whether an activation may write over the layer's value before it, so that a value that was yielded is
            good only until the next is asked for; a third of the time of small networks, without gradients alone.
        only: nodes whose values are wanted: they and what they are computed from are run; None: all.
    """
    values: dict[fx.Node, Any] = {}
    needed = None if only is None else _with_sources(gm, only)
    dying = last_uses(gm)
    device = device_of(gm)
    feed = iter([x.to(device) for x in inputs])
    clips = clips_in_place(gm) if in_place else {}
    for node in gm.graph.nodes:
        if node.op == "output":
            return
        if needed is not None and node not in needed and node.op != "placeholder":
            continue
        if node in clips:
            values[node] = values[node.args[0]].clamp_(*clips[node])
        else:
            values[node] = run_node(gm, node, values, feed)
        yield node, values[node]
        for used in dying.get(node, ()):
            values.pop(used, None)


def _with_sources(gm: fx.GraphModule, nodes: Collection[fx.Node]) -> set[fx.Node]:
    """Some nodes and all that they are computed from."""
    found = set(nodes)
    for node in reversed(gm.graph.nodes):
        if node in found:
            found.update(node.all_input_nodes)
    return found


def channels_last(x: Tensor) -> Tensor:
    """Images (N, C, H, W) and sequences (N, T, C, H, W) with the channels of a pixel side by side.

    This is about twice as fast for depthwise convolutions on the CPU; others are left alone.
    """
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    # so that the frames, moved into the batch, are channels_last without a copy
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if x.ndim == 5 else x


def run_node(
    gm: fx.GraphModule,
    node: fx.Node,
    values: dict[fx.Node, Any],
    feed: Iterator[Tensor] | None = None,
) -> Any:
    """The value of one node, from the values of those before it."""
    if node.op == "placeholder":
        assert feed is not None, node.name
        x = next(feed)
        return channels_last(x)
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(gm)
    args = map_arg(node.args, values.__getitem__)
    kwargs = map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        return gm.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
