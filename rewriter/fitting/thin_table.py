"""What each amount of thinning at each place would cost: a table for all of a network from a few passes.

The first inputs give, for each reader, the second moments of what it reads; from these the optimal
brain surgeon takes the channels of all amounts one after another. On the other inputs, what the
reader makes with the weights of an amount goes on through the rest of the float network, and the
damage is measured. Where that is too much to compute, the error d at the reader is priced by the
Fisher information: damage ~ 1/2 E[(g . d)^2] with g the gradient there of a random projection of
the outputs, one backward pass for all amounts at all places.
The prices add up only roughly: a plan's own fit makes up for some of what earlier steps did.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.damage import fidelity_of
from rewriter.damage.fisher import gradients, weigh
from rewriter.fitting.brain_surgeon import Moments, remove, solve
from rewriter.fitting.readers import influence_of, input_rows, problem_of, rows_of, weights_of
from rewriter.fitting.side_by_side import Batches, some_inputs
from rewriter.graph import facts
from rewriter.graph.cost import layer_macs
from rewriter.graph.interpret import run_node, walk
from rewriter.graph.lookup import find, module_of, outputs
from rewriter.int8.scheme import QuantScheme
from rewriter.plan import Step
from rewriter.rules.thin_channels import AMOUNTS, ThinChannels, channels_of_units, kept_counts
from rewriter.storage.cache import Store, load, save_to
from rewriter.storage.digest import data_digest, graph_digest, key
from rewriter.surgery.hidden_channels import Hidden, hidden_of, kept_columns

log = logging.getLogger(__name__)

# Raised whenever a price comes out differently.
VERSION = 3
# Share of the inputs that fit; the others price.
FITTED = 2 / 3
# Multiply-adds that measuring the amounts may cost, and inputs that are too few to measure on.
BUDGET, FEWEST = 4e11, 12
# Bytes that the second moments of several readers may take at a time.
MEMORY = 400_000_000


@dataclass(frozen=True)
class Price:
    """What a step saves and what it is predicted to cost."""

    macs: int
    damage: float


def thin_table(
    gm: fx.GraphModule,
    batches: Sequence[Tensor | tuple[Tensor, ...]],
    scheme: QuantScheme,
    store: Store | None = None,
    seed: int = 0,
) -> dict[Step, Price]:
    """MACs saved and damage predicted of each ``thin_channels`` step alone.

    Args:
        gm: Profiled canonical graph of the float network.
        batches: Unlabelled inputs; two at least.
        scheme: The target.
        store: Where the table is kept.
        seed: Of positions and projections.
    """
    moved = [b if isinstance(b, tuple) else (b,) for b in batches]
    what = [graph_digest(gm), data_digest(moved), scheme.identity, fidelity_of(gm, moved).digest]
    name = key([*what, f"thin table {VERSION} {seed}"])
    found = None if store is None else load(store, name)
    if found is not None:
        return {
            Step(*text.split("@")): Price(int(macs), float(damage))
            for text, (macs, damage) in found[1]["prices"].items()
        }
    prices = _measured(gm, moved, scheme, seed)
    if store is not None:
        plain = {str(step): [p.macs, p.damage] for step, p in prices.items()}
        save_to(store, name, {"none": torch.zeros(1)}, {"prices": plain})
    return prices


@dataclass
class _Place:
    hidden: Hidden
    steps: dict[int, Step]  # by how many units are left
    saved: dict[Step, int]


def _places(gm: fx.GraphModule) -> list[_Place]:
    found: dict[str, _Place] = {}
    for percent in AMOUNTS:
        rule = ThinChannels(percent)
        for site in rule.match(gm):
            if site.blocked:
                continue
            if site.anchor not in found:
                found[site.anchor] = _Place(hidden_of(gm, find(gm, site.anchor)), {}, {})
            place, step = found[site.anchor], Step.at(site)
            count = kept_counts(place.hidden.channels, place.hidden.unit)[percent]
            place.steps[count // place.hidden.unit] = step
            place.saved[step] = -(rule.added_macs(gm, site) or 0)
    return list(found.values())


def _measured(
    gm: fx.GraphModule, batches: Batches, scheme: QuantScheme, seed: int
) -> dict[Step, Price]:
    places = _places(gm)
    inputs = some_inputs(gm, batches)
    if not places or not inputs:
        return {}
    if not any(facts.INFLUENCE.known(n) for n in gm.graph.nodes):
        weigh(gm, inputs)
    fitted = max(1, round(FITTED * len(inputs)))
    pricing = inputs[fitted:] or inputs
    solved: dict[Step, Tensor] = {}
    for group in _groups(gm, places):
        for place, moments in _moments(gm, group, inputs[:fitted], seed):
            solved |= _solved(gm, place, moments, scheme)
    count = _affordable(gm, places)
    if count >= FEWEST:
        damages = _measured_damages(gm, places, solved, pricing, count)
    else:
        damages = _damages(gm, places, solved, pricing, seed)
    return {
        step: Price(place.saved[step], damages[step])
        for place in places
        for step in place.steps.values()
    }


def _groups(gm: fx.GraphModule, places: Sequence[_Place]) -> Iterator[list[_Place]]:
    """Places whose second moments fit the memory together."""
    group: list[_Place] = []
    size = 0
    for place in places:
        inputs = module_of(gm, _reader(place)).weight[0].numel() + 1
        size += 8 * inputs * inputs
        if group and size > MEMORY:
            yield group
            group, size = [], 8 * inputs * inputs
        group.append(place)
    yield group


def _reader(place: _Place) -> fx.Node:
    assert place.hidden.reader is not None
    return place.hidden.reader


def _moments(
    gm: fx.GraphModule, group: Sequence[_Place], inputs: Batches, seed: int
) -> list[tuple[_Place, Moments]]:
    """Second moments of what each reader reads in the float network."""
    images = sum(len(part[0]) for part in inputs)
    by_source: dict[Any, list[int]] = {}
    for i, place in enumerate(group):
        by_source.setdefault(_reader(place).args[0], []).append(i)
    found: list[Moments | None] = [None] * len(group)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in inputs:
            left = set(by_source)
            for node, value in walk(gm, part):
                for i in by_source.get(node, ()):
                    layer = module_of(gm, _reader(group[i]))
                    rows, _ = rows_of(layer, value, None, images, generator)
                    moments = found[i] or Moments.empty(rows.shape[1], 1, rows.device)
                    moments.add(rows)
                    found[i] = moments
                left.discard(node)
                if not left:
                    break
    return [(p, m) for p, m in zip(group, found, strict=True) if m is not None]


def _solved(
    gm: fx.GraphModule, place: _Place, moments: Moments, scheme: QuantScheme
) -> dict[Step, Tensor]:
    """Weights (K + 1, O) of the reader for each amount, zero where a channel is gone."""
    reader, hidden = _reader(place), place.hidden
    layer = module_of(gm, reader)
    start = weights_of(layer)
    moments.xy = moments.xx @ start  # it wants what it makes
    weight = influence_of(reader, None, len(layer.weight))
    problem = problem_of(gm, hidden, moments, scheme, weight)
    left = remove(problem, list(place.steps))
    found: dict[Step, Tensor] = {}
    for count, step in place.steps.items():
        kept = channels_of_units(left[count], hidden.unit)
        rows = input_rows(layer, kept_columns(gm, hidden, kept))
        whole = torch.zeros_like(start)
        whole[rows] = solve(problem, left[count])
        found[step] = whole.to(layer.weight.dtype)
    return found


def _affordable(gm: fx.GraphModule, places: Sequence[_Place]) -> int:
    """Inputs on which every amount can be run through the rest of the network within the budget."""
    order = {n.name: i for i, n in enumerate(gm.graph.nodes)}
    macs = layer_macs(gm)
    each = 0.0
    for place in places:
        after = order[_reader(place).name]
        each += len(place.steps) * sum(m for name, m in macs.items() if order[name] >= after)
    return int(BUDGET / max(each, 1.0))


def _measured_damages(
    gm: fx.GraphModule,
    places: Sequence[_Place],
    solved: Mapping[Step, Tensor],
    inputs: Batches,
    count: int,
) -> dict[Step, float]:
    """Damage of each step alone on inputs that did not fit it."""
    total = dict.fromkeys(solved, 0.0)
    images = 0
    order = list(gm.graph.nodes)
    returned, fidelity = outputs(gm), fidelity_of(gm, inputs)
    for part in inputs:
        part = tuple(x[: count - images] for x in part)
        if not len(part[0]):
            break
        images += len(part[0])
        with torch.no_grad():
            values: dict[fx.Node, Any] = {}
            feed = iter(part)
            for node in order:
                if node.op != "output":
                    values[node] = run_node(gm, node, values, feed)
            reference = [values[n] for n in returned]
            for place in places:
                reader = _reader(place)
                layer, source = module_of(gm, reader), values[reader.args[0]]  # type: ignore[index]
                for step in place.steps.values():
                    made = values[reader] + _error(layer, source, solved[step])
                    after = _rest(gm, order, values, reader, made)
                    found = [after.get(n, values[n]) for n in returned]
                    each = fidelity.damage(found, reference)
                    total[step] += float(each.sum())
    return {step: d / max(1, images) for step, d in total.items()}


def _rest(
    gm: fx.GraphModule,
    order: Sequence[fx.Node],
    values: dict[fx.Node, Any],
    node: fx.Node,
    value: Tensor,
) -> dict[fx.Node, Any]:
    """The values that change when a node has another value."""
    changed: dict[fx.Node, Any] = {node: value}
    for other in order[order.index(node) + 1 :]:
        if other.op != "output" and any(n in changed for n in other.all_input_nodes):
            given = {n: changed.get(n, values[n]) for n in other.all_input_nodes}
            changed[other] = run_node(gm, other, given)
    return changed


def _damages(
    gm: fx.GraphModule,
    places: Sequence[_Place],
    solved: Mapping[Step, Tensor],
    inputs: Batches,
    seed: int,
) -> dict[Step, float]:
    """1/2 E[(g . d)^2] of each step on inputs that did not fit it."""
    generator = torch.Generator().manual_seed(seed)
    total = dict.fromkeys(solved, 0.0)
    images = 0
    for part in inputs:
        values, slopes = gradients(gm, part, generator, fidelity_of(gm, inputs))
        images += len(part[0])
        for place in places:
            reader = _reader(place)
            if reader not in slopes:
                continue
            layer, source = module_of(gm, reader), values[reader.args[0]].detach()  # type: ignore[index]
            for step in place.steps.values():
                error = _error(layer, source, solved[step])
                each = (slopes[reader].detach() * error).flatten(1).double().sum(1)
                total[step] += float(each.square().sum()) / 2
        del values, slopes
    return {step: d / max(1, images) for step, d in total.items()}


def _error(layer: Any, x: Tensor, w: Tensor) -> Tensor:
    """What the reader makes with other weights, less what it makes."""
    more = w - weights_of(layer).to(w.dtype)
    weight, bias = more[:-1].T.reshape(layer.weight.shape), more[-1]
    state = {"weight": weight, "bias": bias}
    with torch.no_grad():
        if layer.bias is None:
            made = torch.func.functional_call(layer, {"weight": weight}, (x,))
            shape = [1] * made.ndim
            shape[1 if made.ndim == 4 else -1] = -1
            return (
                made + bias.view(shape) if not isinstance(layer, torch.nn.Linear) else made + bias
            )
        return torch.func.functional_call(layer, state, (x,))
