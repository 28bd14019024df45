"""The part of each value's range that its readers can tell apart.

A hard sigmoid is constant outside [-3, 3], a hardswish zero below -3, and a sigmoid changes by less than 1e-4 beyond 9.2 on either
side. What lies out there spends levels of int8 and changes nothing: a range is cut to the widest part that one of its
readers can tell. The readers are operations of the graph, and the user or task behind an output that is said to be
logits before a sigmoid.

Where the task ranks scores (average precision, area under a curve) their order counts too. Behind a sigmoid in int8 the order
beyond the cut is lost already, since its own steps are wider; behind one in float, and at an output, a range is then cut only
where int8 ties fewer pairs of scores than before, among all of them and among the highest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.damage.fidelity import Fidelity
from rewriter.damage.grouping import fidelity_of
from rewriter.graph.interpret import walk
from rewriter.graph.lookup import is_call, module_of, outputs
from rewriter.int8.annotate import annotation, moves_values
from rewriter.int8.integer_grid import steps
from rewriter.int8.scheme import QuantSpec
from rewriter.int8.simulate import Quantized

# A probability that changes by less is the same; so is one that changes by less than this share of its int8 step.
LEAST_CHANGE = 1e-4
SHARE_OF_A_STEP = 1 / 8
# Share of the scores that are the highest, whose order counts by itself.
HIGHEST = 0.01
# Inputs whose scores are compared.
INPUTS = 48

Range = tuple[float, float]
EVERYWHERE: Range = (-math.inf, math.inf)
# Readers that are constant outside a range, and those that come so near to zero on the left that no int8 step shows it.
_FLAT: Mapping[type[nn.Module], Range] = {
    nn.Hardsigmoid: (-3.0, 3.0),
    nn.Hardswish: (-3.0, math.inf),
    nn.ReLU: (0.0, math.inf),
    nn.ReLU6: (0.0, 6.0),
    nn.SiLU: (-14.0, math.inf),
    nn.Mish: (-14.0, math.inf),
    nn.GELU: (-5.0, math.inf),
}


@dataclass(frozen=True)
class _Needed:
    """What a reader can tell, and whether scores come of it whose order is not lost to int8 anyway."""

    bounds: Range
    ranks: bool = False


def cut_to_useful(
    quantized: Quantized, batches: Sequence[Tensor | tuple[Tensor, ...]]
) -> Quantized:
    """The same network with each range cut to what its readers can tell; zero stays in every range.

    Args:
        quantized: annotated and calibrated graph.
        batches: calibration inputs, each (N, ...), or a tuple with one tensor for each input.
    """
    fidelity = fidelity_of(quantized.gm, batches)
    ranges = dict(quantized.calibration.values)
    ranked: dict[str, Range] = {}
    for owner, members in _members(quantized.gm).items():
        if owner not in ranges:
            continue
        needed = [n for v in members for n in _readers(quantized, v, fidelity)]
        cut = _inside(ranges[owner], [n.bounds for n in needed])
        if cut != ranges[owner] and fidelity.ranks and any(n.ranks for n in needed):
            ranked[owner] = cut
        else:
            ranges[owner] = cut
    if ranked:
        for owner in _better_ordered(quantized, ranked, batches):
            ranges[owner] = ranked[owner]
    return replace(quantized, calibration=replace(quantized.calibration, values=ranges))


def _members(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The values that have each range, by its owner."""
    found: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        note = annotation(node)
        if note.output is not None:
            found.setdefault(note.range_of, []).append(node)
    return found


def _readers(quantized: Quantized, value: fx.Node, fidelity: Fidelity) -> Iterator[_Needed]:
    """What each reader of a value needs; what only moves it is looked through."""
    gm, owner = quantized.gm, annotation(value).range_of
    for reader in value.users:
        if reader.op == "output":
            yield from _at_output(gm, value, fidelity)
        elif owner and annotation(reader).range_of == owner:
            continue  # one range for both: what reads the result decides
        elif moves_values(gm, reader):
            if annotation(reader).output is None:  # a value of its own is looked at by itself
                yield from _readers(quantized, reader, fidelity)
        else:
            yield _of(quantized, reader)


def _of(quantized: Quantized, reader: fx.Node) -> _Needed:
    gm = quantized.gm
    if reader.op != "call_module":
        return _Needed(EVERYWHERE)
    module: Any = module_of(gm, reader)
    if is_call(gm, reader, nn.Sigmoid, nn.Tanh):
        note, values = annotation(reader), quantized.calibration.values
        least, ranks = LEAST_CHANGE, True
        if note.output is not None and note.range_of in values:
            step = note.output.params(*values[note.range_of])[0]
            least, ranks = min(least, SHARE_OF_A_STEP * step), False
        least = max(least, 1e-12)
        end = math.log((1 - least) / least)
        end = end if is_call(gm, reader, nn.Sigmoid) else end / 2  # tanh(x) = 2 sigmoid(2 x) - 1
        return _Needed((-end, end), ranks and _reaches_output(gm, reader))
    if type(module) is nn.Hardtanh:
        return _Needed((float(module.min_val), float(module.max_val)))
    return _Needed(_FLAT.get(type(module), EVERYWHERE))


def _at_output(gm: fx.GraphModule, value: fx.Node, fidelity: Fidelity) -> Iterator[_Needed]:
    end = math.log((1 - LEAST_CHANGE) / LEAST_CHANGE)
    for i, returned in enumerate(outputs(gm)):
        if returned is value:
            kinds = {g.kind for g in fidelity.groups if g.output == i}
            known = kinds == {"sigmoid_logits"}
            yield _Needed((-end, end), ranks=True) if known else _Needed(EVERYWHERE)


def _reaches_output(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether scores are returned as they are, or moved."""
    return any(
        user.op == "output" or (moves_values(gm, user) and _reaches_output(gm, user))
        for user in node.users
    )


def _inside(seen: Range, needed: Sequence[Range]) -> Range:
    """The part of a seen range that is needed, unless that leaves nothing of it."""
    low = max(seen[0], min((n[0] for n in needed), default=-math.inf))
    high = min(seen[1], max((n[1] for n in needed), default=math.inf))
    # all on one side: there is nothing that the readers tell apart, and no scale follows from it
    return (min(low, 0.0) if low > seen[0] else low, max(high, 0.0) if high < seen[1] else high)


def _better_ordered(
    quantized: Quantized,
    ranked: Mapping[str, Range],
    batches: Sequence[Tensor | tuple[Tensor, ...]],
) -> Iterator[str]:
    """Those ranges that tie fewer pairs of scores when they are cut."""
    members = _members(quantized.gm)
    watched = {n: owner for owner in ranked for n in members[owner]}
    seen: dict[str, list[Tensor]] = {owner: [] for owner in ranked}
    left = INPUTS
    with torch.no_grad():
        for batch in batches:
            some = tuple(x[:left] for x in (batch if isinstance(batch, tuple) else (batch,)))
            left -= len(some[0])
            for node, value in walk(quantized.gm, some):
                if node in watched and not moves_values(quantized.gm, node):
                    seen[watched[node]].append(value.flatten().cpu())
            if left <= 0:
                break
    for owner, cut in ranked.items():
        if not seen[owner]:
            continue
        spec = annotation(members[owner][0]).output
        assert spec is not None
        scores = torch.cat(seen[owner])
        before = ties(scores, quantized.calibration.values[owner], spec)
        after = ties(scores, cut, spec)
        if after[0] < before[0] and after[1] <= before[1]:
            yield owner


def ties(scores: Tensor, ends: Range, spec: QuantSpec) -> tuple[float, float]:
    """Share of pairs of scores that int8 makes equal, among all and among the highest."""
    scale, zero = spec.params(*ends)
    whole = steps(scores.double(), scale).clamp(*ends(spec, zero))
    count = max(2, round(HIGHEST * len(scores)))
    highest = whole[scores.topk(min(count, len(scores))).indices]
    return _equal_pairs(whole), _equal_pairs(highest)


def _equal_pairs(levels: Tensor) -> float:
    _, counts = levels.unique(return_counts=True)
    return float((counts.double() / len(levels)).square().sum())
