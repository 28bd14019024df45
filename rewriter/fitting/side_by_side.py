"""Two networks run side by side over all inputs at once, node by node, so that a fit of one place is followed by the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.graph import facts
from rewriter.graph.interpret import last_uses, run_node, walk

Batches = Sequence[tuple[Tensor, ...]]

# Inputs that are used, and bytes that their values may take at any time.
INPUTS, MEMORY = 96, 600_000_000
PART = 8  # inputs that are run at a time


def some_inputs(gm: fx.GraphModule, batches: Batches, most: int = INPUTS) -> Batches:
    """The first inputs, as many as fit the memory, in parts of a few."""
    each = 2 * _live_bytes(gm)
    left = max(16, min(most, MEMORY // max(1, each)))
    found: list[tuple[Tensor, ...]] = []
    for batch in batches:
        for part in zip(*(x.split(PART) for x in batch), strict=True):
            taken = tuple(x[:left] for x in part)
            left -= len(taken[0])
            found.append(taken)
            if left <= 0:
                return found
    return found


def _live_bytes(gm: fx.GraphModule) -> int:
    """The most that the values of one input take at any time."""
    dying, live, most = last_uses(gm), dict[fx.Node, int](), 0
    for node in gm.graph.nodes:
        shape = facts.SHAPE.get(node)
        plain = isinstance(shape, tuple) and all(isinstance(n, int) for n in shape)
        live[node] = 4 * torch.Size(shape).numel() if plain else 0  # type: ignore[arg-type]
        most = max(most, sum(live.values()))
        for gone in dying.get(node, ()):
            live.pop(gone, None)
    return most


class Values:
    """The values of a network for all inputs, up to some node; values no longer needed are dropped."""

    def __init__(self, gm: fx.GraphModule, inputs: Batches, kept: Iterable[fx.Node]) -> None:
        self.gm = gm
        self.order = list(gm.graph.nodes)
        self.at = 0
        self.kept = set(kept)
        self.parts: list[dict[fx.Node, Any]] = [{} for _ in inputs]
        self.feeds = [iter(part) for part in inputs]
        self.dying = last_uses(gm)

    def before(self, node: fx.Node) -> None:
        """Run all nodes before this one."""
        while self.at < len(self.order) and self.order[self.at] is not node:
            here = self.order[self.at]
            if here.op == "output":
                return
            for values, feed in zip(self.parts, self.feeds, strict=True):
                with torch.no_grad():
                    values[here] = run_node(self.gm, here, values, feed)
                for gone in self.dying.get(here, ()):
                    if gone not in self.kept:
                        values.pop(gone, None)
            self.at += 1

    def through(self, node: fx.Node) -> None:
        """Run all nodes up to this one."""
        if node not in self.order[: self.at]:
            self.before(node)
            self.before(self.order[self.at + 1])

    def drop(self, node: fx.Node) -> None:
        """No longer keep a value for its own sake."""
        self.kept.discard(node)
        last = next(n for n, dead in self.dying.items() if node in dead)
        if last in self.order[: self.at]:
            for values in self.parts:
                values.pop(node, None)


def run_again(
    gm: fx.GraphModule,
    values: Mapping[fx.Node, Any],
    node: Any,
    given: set[fx.Node] | None = None,
) -> Tensor:
    """The value of a node from those that are still known (or from ``given`` ones alone)."""
    found: dict[fx.Node, Any] = {}

    def value(n: fx.Node) -> Any:
        if n not in found:
            if (given is None and n in values) or (given is not None and n in given):
                found[n] = values[n]
            else:
                for source in n.all_input_nodes:
                    value(source)
                found[n] = run_node(gm, n, found)
        return found[n]

    with torch.no_grad():
        return value(node)


def values(
    gm: fx.GraphModule, names: Sequence[str], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The values of nodes by name; nothing after the last of them is run."""
    found: dict[str, Tensor] = {}
    for node, value in walk(gm, inputs):
        if node.name in names:
            found[node.name] = value
            if len(found) == len(set(names)):
                break
    return tuple(found[name] for name in names)
