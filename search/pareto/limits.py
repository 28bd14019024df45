"""What a plan may cost: limits that its network, its file, or its time on this machine must meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import fx

from rewriter import Plan, Step, cost
from rewriter.errors import RewriteError
from rewriter.graph import facts, layer_name, layers
from rewriter.int8 import is_decoding
from rewriter.int8.onnx import ReadBack
from rewriter.plan import rewrite, rule_named
from rewriter.rules import WholeModelRule
from search.latency.price import Price
from search.run_dir.scores import Score

# Layers in float that a score names, the largest.
MOST_REASONS = 20


@dataclass(frozen=True)
class Limits:
    """Upper bounds of a plan on the front; None: no bound.

    Attributes:
        macs: Multiply-accumulates for one input.
        params: Parameters.
        weight_bytes: Bytes of the stored weights.
        float_layers: Weighted layers left in float.
        float_islands: Connected groups of such layers; each costs a runtime a way out of int8 and
            back.
        latency_ms: Milliseconds for one input, as measured on the machine that searches.
        latency_ratio: Time of the file by the table of kernels, relative to that of plain int8.
    """

    macs: float | None = None
    params: float | None = None
    weight_bytes: float | None = None
    float_layers: int | None = None
    float_islands: int | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None

    @classmethod
    def of(cls, values: Mapping[str, float | None]) -> Limits:
        """The limits that `to_dict` gave; keys of another version are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)

    def excess(self, score: Score) -> dict[str, float]:
        """By how much a score is above each limit; a negative number is room to spare.

        A value that was not measured is taken to be at the limit: it says nothing against the plan.
        """
        found: dict[str, float] = {}
        for name, bound in asdict(self).items():
            if bound is not None:
                value = getattr(score, name)
                found[f"max_{name}"] = 0.0 if value is None else float(value - bound)
        return found

    def meets(self, score: Score) -> bool:
        return all(more <= 0 for more in self.excess(score).values())

    def admits(
        self, gm: fx.GraphModule, facts: Mapping[str, Any] | None = None
    ) -> Callable[[Plan], bool]:
        """Says of a plan, before it is fitted or run, whether its network can be made and meets the limits.

        The steps that change layers are carried out on a copy of the graph, which takes a tenth of a
        second where fitting and running the plan takes seconds; those that only change numbers are
        asked whether they match there. Many combinations fail: a layer that one step has replaced is
        not found by the next, or has no channels that may still be split. MACs are not looked at,
        since the space adds them up.

        Args:
            gm: Profiled canonical graph.
            facts: See `rewriter.plan.rewrite`.
        """
        counted = replace(self, macs=None, latency_ms=None, latency_ratio=None)
        answers: dict[Plan, bool] = {}

        def admitted(plan: Plan) -> bool:
            if plan not in answers:
                numbers = [rule for step in plan.steps if (rule := _changes_numbers(step))]
                shape = Plan(tuple(s for s in plan.steps if _changes_numbers(s) is None))
                try:
                    made = rewrite(gm, shape, facts=facts)
                except RewriteError:
                    answers[plan] = False
                    return False
                answers[plan] = counted.meets(size_of(plan, made)) and not any(
                    rule.problem(made) for rule in numbers
                )
            return answers[plan]

        return admitted


def _changes_numbers(step: Step) -> WholeModelRule | None:
    """The rule of a step after which the graph has the same layers; None for any other."""
    rule = rule_named(step.rule)
    return rule if isinstance(rule, WholeModelRule) and not rule.replaces else None


def size_of(plan: Plan, gm: fx.GraphModule) -> Score:
    """The part of a plan's score that its rewritten graph shows without being run on images."""
    spent = cost(gm)
    return Score(
        plan=str(plan),
        macs=spent.macs,
        params=spent.params,
        weight_bytes=spent.weight_bytes,
        # of a layer that a step has split the parts count as one
        float_layers=len({layer_name(node) for node in _weighted(gm) if _in_float(node)}),
        float_islands=float_islands(gm),
    )


def with_file(score: Score, found: ReadBack) -> Score:
    """A score with what the plan's file computes in int8."""
    return replace(
        score,
        int8_share=round(found.int8_share, 6),
        float_ops=found.float_ops,
        float_reasons={layer.layer: layer.reason for layer in found.float_layers[:MOST_REASONS]},
    )


def with_price(score: Score, price: Price, plain_ms: float) -> Score:
    """A score with what the plan's file costs, and how that compares with the file of plain int8."""
    counts = {
        "bytes": price.size,
        "bytes_moved": price.bytes_moved,
        "int8_macs": price.int8_macs,
        "float_macs": price.float_macs,
        "operators": price.operators,
        "reorders": sum(price.reorders.values()),
    }
    ratio = round(price.milliseconds / plain_ms, 4)
    return replace(score, predicted_ms=price.milliseconds, latency_ratio=ratio, price=counts)


def float_islands(gm: fx.GraphModule) -> int:
    """Number of groups of layers left in float that feed each other with no int8 layer between."""
    weighted = set(_weighted(gm))
    island = {node: node for node in weighted if _in_float(node)}

    def root(node: fx.Node) -> fx.Node:
        while island[node] is not node:
            node = island[node]
        return node

    for start in list(island):
        for reached in _readers(start, weighted):
            if reached in island:
                island[root(reached)] = root(start)
    return sum(node is above for node, above in island.items())


def _readers(start: fx.Node, weighted: set[fx.Node]) -> Iterable[fx.Node]:
    """The weighted layers that read a node's value, directly or through other operations."""
    seen: set[fx.Node] = set()
    frontier = list(start.users)
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in weighted:
            yield node
        else:
            frontier.extend(node.users)


def _weighted(gm: fx.GraphModule) -> list[fx.Node]:
    """Weighted layers; the arithmetic behind a detection head is none of them."""
    return [node for node in layers(gm) if not is_decoding(gm, node)]


def _in_float(node: fx.Node) -> bool:
    return bool(facts.KEEP_FLOAT.get(node))
