"""Weights around an activation that was replaced: the layer before it, and the layers that read it.

    f(z) ~ s g(a z + b) + c     for each channel

Of a grid of a and b those are taken, by channel, that leave least after a regression on g; a and b go into the
layer, s into the layer (ReLU, which is homogeneous) or into the readers. Then each reader is fitted in closed form,
in the order of the graph, on what it reads in the network as it is rewritten so far, towards what the *float* network
has behind it; how far its weights are pulled towards those it had is judged on inputs held back. At last a few
gradient steps move the layer and those behind it (``rewriter.fitting.distill``). Nothing is rounded meanwhile: what was
replaced can be scaled or split afterwards, and a fit on values of which one coarse range has left nothing would give
them up.

A fit depends on the steps before it in the graph and is stored by them: where the reader of one activation is the
layer of the next, both steps move it, one after the other.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.damage.grouping import fidelity_of
from rewriter.fitting.distill import distill
from rewriter.fitting.refit import refit
from rewriter.fitting.side_by_side import Batches, values
from rewriter.graph import facts
from rewriter.graph.lookup import find, is_call, layers, module_of
from rewriter.int8.scheme import QuantScheme
from rewriter.plan import Plan, Step, rewrite, rule_named
from rewriter.rules.fold_gate import FoldGate
from rewriter.rules.replace_activation import ReplaceActivation, next_layers, reads_directly
from rewriter.storage.cache import Store, load, save_to
from rewriter.storage.digest import data_digest, graph_digest, key

log = logging.getLogger(__name__)
State = dict[str, Tensor]

# Raised whenever a fit comes out differently, so that stored ones are not taken for it.
VERSION = 3
# Values of each channel that the shape of the function is fitted on.
ROWS = 8192
# Shifts and slopes that are tried for each channel. A channel that hardly leaves zero is nearly linear there: it is
# moved by the least of its values, or by some quantile of them, and so passes a ReLU with a range as narrow as its own.
SHIFTS = (0.0, -1.0, -0.75, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 0.75, 1.0)
QUANTILES = (0.0, 0.02, 0.1, 0.3, 0.5)
LINEAR = 2.0
# A shift must leave this share less than one that was tried before it.
BETTER = 0.98
# Where zeros are put around a value they count as what the function gives there: of its places so many.
PADDED = 0.1
SLOPES = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 1.7, 2.0)
CAP = 6.0
# Layers after the activation that gradient steps move.
NEIGHBORS = 3
# Of the gradient steps that a whole new layer takes: here most is known from the closed form.
DISTILLED = 0.25


def is_activation(step: Step) -> bool:
    """Whether a step replaces an activation, or a gate by what it mostly is."""
    return isinstance(rule_named(step.rule), (ReplaceActivation, FoldGate))


@dataclass(frozen=True)
class Shape:
    """f(z) ~ scale g(slope z + shift) + offset, (C,) each."""

    slope: Tensor
    shift: Tensor
    scale: Tensor
    offset: Tensor


def fit_activations(
    teacher: fx.GraphModule,
    base: fx.GraphModule,
    steps: Sequence[Step],
    batches: Batches,
    scheme: QuantScheme,
    store: Store | None = None,
    seed: int = 0,
    distilled: bool = True,
) -> Iterator[tuple[Step, State, dict[str, Any]]]:
    """Weights of each step, and how it came out (error, error_int8, images, steps, seconds).

    Args:
        teacher: canonical graph of the original network, on the device to work on.
        base: the same with all steps before these, fitted; it is not touched.
        steps: all that replace an activation, in the order of the graph.
        batches: unlabeled inputs, on the same device.
        scheme: the target.
        store: where fits are kept.
        seed: of whatever is random.
        distilled: go on after the closed form.

    Raises:
        PlanError: a step does not apply.
    """
    what = [graph_digest(teacher), graph_digest(base), data_digest(batches), scheme.identity]
    what += [fidelity_of(teacher, batches).digest, f"activations {VERSION} {seed} {distilled}"]
    student = base
    for count, step in enumerate(steps, 1):
        name = key([*what, *map(str, steps[:count])])
        found = None if store is None else load(store, name)
        if found is None:
            start = time.perf_counter()
            one = rewrite(student, Plan((step,)))
            state, report = _fit(teacher, student, one, step, batches, scheme, seed, distilled)
            report["seconds"] = time.perf_counter() - start
            log.info("%s: relative error %.4f, %d steps", step, report["error"], report["steps"])
            if store is not None:
                save_to(store, name, state, report)
            found = state, report
        student = rewrite(student, Plan((step,)), {str(step): found[0]})
        yield step, *found


def _fit(
    teacher: fx.GraphModule,
    before: fx.GraphModule,
    student: fx.GraphModule,
    step: Step,
    batches: Batches,
    scheme: QuantScheme,
    seed: int,
    distilled: bool,
) -> tuple[State, dict[str, Any]]:
    """Fit one step: ``before`` it the network has the old function, the ``student`` the new one."""
    if isinstance(rule_named(step.rule), FoldGate):
        return _fit_reader(teacher, student, step, batches, scheme, seed, distilled)
    layer_node = find(student, step.anchor)
    (activation,) = layer_node.users
    function = module_of(before, find(before, activation.name))
    replaced = module_of(student, activation)
    readers = next_layers(student, activation)
    moved = list(dict.fromkeys([*readers, *_followers(student, activation)]))
    _own(student, (layer_node, *moved))
    linear = is_call(student, layer_node, nn.Linear)
    z = _rows(before, layer_node.name, batches, -1 if linear else 1, seed)
    direct = reads_directly(student, activation) and all(
        is_call(student, r, nn.Linear) == linear for r in readers
    )
    padded = any(_pads(module_of(student, reader)) for reader in readers)
    shape = fitted_shape(z, function(z), replaced, direct, padded)
    _put_shape(student, layer_node, readers if direct else [], replaced, shape)
    known = {n.name for n in teacher.graph.nodes}
    errors = [
        refit(teacher, student, reader, batches, scheme, seed)
        for reader in readers
        if reader.name in known
    ]
    kept = 0
    if distilled:
        kept = _distilled(teacher, student, layer_node, moved, batches, scheme, seed)
    state = _state(student, layer_node, moved if kept else readers)
    return state, _report(errors, batches, kept)


def _fit_reader(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    step: Step,
    batches: Batches,
    scheme: QuantScheme,
    seed: int,
    distilled: bool,
) -> tuple[State, dict[str, Any]]:
    """Fit the reader of a value that is no longer gated."""
    reader = next(n for n in layers(student) if facts.REWRITTEN_BY.get(n) == str(step))
    moved = _followers(student, reader)
    _own(student, (reader, *moved))
    errors = [refit(teacher, student, reader, batches, scheme, seed)]
    kept = _distilled(teacher, student, reader, moved, batches, scheme, seed) if distilled else 0
    state = _state(student, None, (reader, *(moved if kept else ())))
    return state, _report(errors, batches, kept)


def _own(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
    """Edit gm: these layers are copies of their own, with a bias each."""
    for node in nodes:
        layer = copy.deepcopy(module_of(gm, node))
        if layer.bias is None:
            axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            size = layer.weight.shape[axis]
            layer.bias = nn.Parameter(layer.weight.new_zeros(size), requires_grad=False)
        gm.set_submodule(str(node.target), layer)


def _distilled(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    node: fx.Node,
    moved: Sequence[fx.Node],
    batches: Batches,
    scheme: QuantScheme,
    seed: int,
) -> int:
    """Move a layer and those behind it by gradient steps; how many were kept."""
    near = [n for n in moved if is_call(student, n, nn.Conv2d, nn.Linear)]
    return distill(teacher, student, node, batches, scheme, None, near, seed, DISTILLED)


def _state(gm: fx.GraphModule, first: fx.Node | None, others: Sequence[fx.Node]) -> State:
    """Weights of a layer, and of others under their names."""
    found: State = {}
    nodes = [*([] if first is None else [first]), *others]
    for node in dict.fromkeys(nodes):
        owner = "" if node is first else f"{node.name}."
        for name, value in module_of(gm, node).state_dict().items():
            found[owner + name] = value.detach().cpu().clone()
    return found


def _report(errors: Sequence[tuple[float, float]], batches: Batches, kept: int) -> dict[str, Any]:
    mean = [sum(e[i] for e in errors) / max(1, len(errors)) for i in (0, 1)]
    images = sum(len(b[0]) for b in batches)
    return {"error": mean[0], "error_int8": mean[1], "images": images, "steps": kept}


def _followers(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The next layers that depend on a value."""
    after, found, weighted = {node}, list[fx.Node](), set(layers(gm))
    later = node.next
    while later.op != "root" and len(found) < NEIGHBORS:
        if after & set(later.all_input_nodes):
            after.add(later)
            if later in weighted:
                found.append(later)
        later = later.next
    return found


# ------------------------------------------------------------------------- the function's shape


def fitted_shape(
    z: Tensor, wanted: Tensor, made: nn.Module, free: bool, padded: bool = False
) -> Shape:
    """The best slope, shift, scale and offset of each channel, of those on the grid.

    Args:
        z: (rows, C) what the function reads.
        wanted: (rows, C) what it gave.
        made: the new function.
        free: whether readers can take a scale.
        padded: whether readers put zeros around the value.
    """
    z, wanted = z.double(), wanted.double()
    one = torch.ones(z.shape[1], dtype=z.dtype, device=z.device)
    capped, homogeneous = isinstance(made, nn.ReLU6), isinstance(made, nn.ReLU)
    best: Shape | None = None
    least = torch.full_like(one, float("inf"))
    for slope in SLOPES if not (capped or homogeneous) else (1.0,):
        ends = [-z.quantile(q, 0).clamp(-LINEAR, LINEAR) for q in QUANTILES]
        for shift in (*(torch.tensor(v).to(z) for v in SHIFTS[:1]), *ends, *SHIFTS[1:]):
            a, b = slope * one, slope * shift * one
            if capped:  # the widest value of each channel lies at the cap
                high = z.amax(0) + shift
                a = torch.where(high > 0, CAP / high.clamp_min(1e-6), one)
                b = a * shift
            g = made(a * z + b)
            if free or homogeneous:
                centered = g - g.mean(0)
                s = (centered * wanted).mean(0) / centered.square().mean(0).clamp_min(1e-12)
                s = torch.where(s > 0, s, one)
            else:
                s = one
            c = (wanted - s * g).mean(0)
            left = (wanted - s * g - c).square().mean(0)
            if padded:
                left = left + PADDED * c.square()
            better = left < BETTER * least
            new = Shape(a, b, s, c)
            if best is None:
                best = new
            else:
                fields = zip(vars(new).values(), vars(best).values(), strict=True)
                best = Shape(*(torch.where(better, n, o) for n, o in fields))
            least = torch.where(better, left, least)
    assert best is not None
    return best


def _pads(layer: nn.Module) -> bool:
    amount = getattr(layer, "padding", 0)
    return amount == "same" or (amount != "valid" and bool(torch.tensor(amount).any()))


def _put_shape(
    gm: fx.GraphModule,
    layer_node: fx.Node,
    readers: Sequence[fx.Node],
    made: nn.Module,
    shape: Shape,
) -> None:
    """Edit gm: slope and shift into the layer, scale into the layer or the readers."""
    layer = module_of(gm, layer_node)
    slope, shift, scale = shape.slope, shape.shift, shape.scale
    if isinstance(made, nn.ReLU):
        slope, shift = slope * scale, shift * scale
    weight = layer.weight.detach()
    factor = slope.to(weight)
    layer.weight.data = weight * factor.view(-1, *[1] * (weight.ndim - 1))
    layer.bias.data = layer.bias.detach() * factor + shift.to(weight)
    if isinstance(made, nn.ReLU):
        return
    for reader in readers:
        weighted = module_of(gm, reader)
        weight = weighted.weight.detach()
        groups = getattr(weighted, "groups", 1)
        parts = scale.to(weight).view(groups, -1).repeat_interleave(len(weight) // groups, 0)
        weighted.weight.data = weight * parts.view(*parts.shape, *[1] * (weight.ndim - 2))


def _rows(gm: fx.GraphModule, name: str, batches: Batches, axis: int, seed: int) -> Tensor:
    """(rows, C) some values of a node."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for batch in batches:
        with torch.no_grad():
            (x,) = values(gm, (name,), batch)
        rows = x.movedim(axis, -1).flatten(0, -2)
        most = max(1, -(-ROWS // len(batches)))
        if len(rows) > most:
            rows = rows[torch.randperm(len(rows), generator=generator)[:most].to(rows.device)]
        found.append(rows)
    return torch.cat(found)
