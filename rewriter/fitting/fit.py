"""Weights for approximate rewrites, without labels, from a few hundred unlabeled inputs.

First in closed form, to give the values that the replaced layers gave
(``rewriter.fitting.least_squares``); then by gradient steps so that the *network* gives what it gave
(``rewriter.fitting.distill``), which move the few layers after the new one with it.

Each approximate step is fitted alone, against the original network, so that a fit belongs to a
(site, rule) and not to a plan: a plan with ten such steps is assembled from ten fits. Where steps
of a plan are so close that one would move a layer that another replaces or moves too, it takes the
weights of a second fit, that of its new layer alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, fx, nn

from rewriter.damage.grouping import fidelity_of
from rewriter.errors import PlanError, QuantizeError
from rewriter.fitting.activations import fit_activations, is_activation
from rewriter.fitting.distill import distill, rounded_weight
from rewriter.fitting.least_squares import NormalEquations
from rewriter.fitting.side_by_side import values
from rewriter.fitting.thinning import fit_thin, is_thin
from rewriter.graph import facts
from rewriter.graph.edit import copy_graph
from rewriter.graph.lookup import find, layers, module_of
from rewriter.int8.integer_grid import fake_quantize
from rewriter.int8.scheme import QuantScheme
from rewriter.plan import Plan, Step, in_order, rewrite, rule_named
from rewriter.storage.cache import Store, load, save_to
from rewriter.storage.digest import data_digest, graph_digest, key

log = logging.getLogger(__name__)
Batches = Sequence[Tensor | tuple[Tensor, ...]]

# Raised whenever a fit comes out differently, so that stored ones are not taken for it.
VERSION = 5
# Layers after the new one that are fitted with it: about the next block.
NEIGHBORS = 3
RIDGES = (1e-7, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class FitReport:
    """How one approximate step came out.

    Args:
        step: ``rule@anchor``.
        error_float: squared error of the new layer relative to the variance of the values it
            replaces.
        error_int8: the same with its weights and its input in int8.
        images: number of inputs it was fitted on.
        steps: gradient steps that were kept, 0 for the closed form alone.
        seconds: what the fit took when it was made.
    """

    step: str
    error_float: float
    error_int8: float
    images: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Fits:
    """Fitted weights by step (``rule@anchor``), and how each came out."""

    weights: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=dict[str, Mapping[str, Tensor]]
    )
    reports: tuple[FitReport, ...] = ()


def fit(
    gm: fx.GraphModule,
    plan: Plan,
    batches: Batches,
    scheme: QuantScheme,
    store: Store | None = None,
    seed: int = 0,
    distilled: bool = True,
    device: str = "cpu",
) -> Fits:
    """Weights for every approximate step of a plan, for ``rewrite(gm, plan, fits.weights)``.

    Args:
        gm: canonical graph of the original network, the teacher; it is not touched.
        plan: its steps with an approximate rule are fitted.
        batches: unlabelled calibration inputs, each (N, C, H, W).
        scheme: the target: the new layer is fitted on its input as it is there.
        store: folder with fitted weights; what is found there is not fitted again.
        seed: of whatever is random.
        distilled: go on after the closed form.
        device: where fits that the store does not have are made; what comes out lies on the CPU.

    Raises:
        QuantizeError: there is no input.
        PlanError: a step does not apply.
    """
    weights: dict[str, Mapping[str, Tensor]] = {}
    reports: list[FitReport] = []
    teacher: fx.GraphModule | None = None
    moved: list[tuple[Tensor, ...]] = []
    near = neighbors(gm, plan) if distilled else {}
    for step in plan.steps:
        rule = rule_named(step.rule)
        if rule.contract != "approximate" or rule.saves or is_activation(step):
            continue
        if not batches:
            raise QuantizeError(f"{step}: fitting: no input was given")
        name, found = "", None
        if store is not None:
            what = (str(step), str(rule.version), str(VERSION), str(distilled), str(seed))
            what = (*what, fidelity_of(gm, batches).digest)  # what distilling makes least
            also = near.get(step, ())
            name = key([graph_digest(gm), data_digest(batches), scheme.identity, *what, *also])
            found = load(store, name)
        if found is None:
            if teacher is None:
                teacher = gm if device == "cpu" else copy_graph(gm).to(device)
                moved = [tuple(x.to(device) for x in _tuple(b)) for b in batches]
            alone = rewrite(gm, Plan((step,))).to(device)
            after = near.get(step, ()) if distilled else None
            state, report = _fit_step(teacher, alone, step, moved, scheme, seed, after)
            if store is not None:
                save_to(store, name, state, asdict(report))
        else:
            state, report = found[0], FitReport(**found[1])
        weights[str(step)] = state
        reports.append(report)
    settings = (batches, scheme, store, seed, device)
    for step, state, report in _activations(gm, plan, weights, distilled, *settings):
        weights[str(step)] = state
        reports.append(report)
    for step, state, report in _thinned(gm, plan, weights, *settings):
        weights[str(step)] = state
        reports.append(report)
    return Fits(weights, tuple(reports))


def _activations(
    gm: fx.GraphModule,
    plan: Plan,
    weights: Mapping[str, Mapping[str, Tensor]],
    distilled: bool,
    batches: Batches,
    scheme: QuantScheme,
    store: Store | None,
    seed: int,
    device: str,
) -> Iterator[tuple[Step, dict[str, Tensor], FitReport]]:
    """What the steps that replace activations come to, on top of those that replace layers."""
    ordered = [step for _, step in in_order(gm, plan)]
    steps = [step for step in ordered if is_activation(step)]
    if not steps:
        return
    teacher, base, moved = _beside(gm, steps, ordered, weights, batches, device)
    for step, state, report in fit_activations(
        teacher, base, steps, moved, scheme, store, seed, distilled
    ):
        named = {"error_float": report["error"], "error_int8": report["error_int8"]}
        rest = {k: report[k] for k in ("images", "steps", "seconds")}
        yield step, state, FitReport(str(step), **named, **rest)


def _beside(
    gm: fx.GraphModule,
    steps: Sequence[Step],
    ordered: Sequence[Step],
    weights: Mapping[str, Mapping[str, Tensor]],
    batches: Batches,
    device: str,
) -> tuple[fx.GraphModule, fx.GraphModule, list[tuple[Tensor, ...]]]:
    """On the device: the original, the network with all that comes before some steps, and the inputs."""
    if not batches:
        raise QuantizeError(f"{steps[0]}: fitting: no input was given")
    base = rewrite(gm, Plan(tuple(ordered[: ordered.index(steps[0])])), weights)
    rewrite(base, Plan(tuple(steps)))  # one that does not apply is refused before any is fitted
    teacher = gm
    if device != "cpu":
        teacher, base = copy_graph(gm).to(device), base.to(device)
    return teacher, base, [tuple(x.to(device) for x in _tuple(b)) for b in batches]


def _thinned(
    gm: fx.GraphModule,
    plan: Plan,
    weights: Mapping[str, Mapping[str, Tensor]],
    batches: Batches,
    scheme: QuantScheme,
    store: Store | None,
    seed: int,
    device: str,
) -> Iterator[tuple[Step, dict[str, Tensor], FitReport]]:
    """What the steps that take channels away come to, on top of those that replace layers."""
    ordered = [step for _, step in in_order(gm, plan)]
    thin = [step for step in ordered if is_thin(step)]
    if not thin:
        return
    teacher, base, moved = _beside(gm, thin, ordered, weights, batches, device)
    for step, state, report in fit_thin(teacher, base, thin, moved, scheme, store, seed):
        error = report["error"]
        yield (
            step,
            state,
            FitReport(str(step), error, error, report["images"], 0, report["seconds"]),
        )


def _fit_step(
    gm: fx.GraphModule,
    alone: fx.GraphModule,
    step: Step,
    batches: Sequence[tuple[Tensor, ...]],
    scheme: QuantScheme,
    seed: int,
    after: tuple[str, ...] | None,
) -> tuple[dict[str, Tensor], FitReport]:
    """Fit one step; ``after``: the layers to fit with it, or None for the closed form alone."""
    start = time.perf_counter()
    node = fitted_layer(alone, step)
    layer = module_of(alone, node)
    if not isinstance(layer, nn.Conv2d):
        raise PlanError(f"{step}: fitting: {type(layer).__name__} is no Conv2d")
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_channels), requires_grad=False)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    scale = _input_scale(gm, source.name, batches, scheme)
    images = sum(len(b[0]) for b in batches)
    places = torch.Size(facts.SHAPE.of(node)[2:]).numel()
    equations = NormalEquations(layer, images * places, seed)
    with torch.no_grad():
        for batch in batches:
            x, y = values(gm, (source.name, node.name), batch)
            equations.add(fake_quantize(x, *scale, scheme.activations), y)
    _solve(layer, equations, scheme)
    steps = 0
    also = [find(alone, name) for name in after or ()]
    if after is not None:
        steps = distill(gm, alone, node, batches, scheme, scale, also, seed)
    error = equations.error()
    seconds = time.perf_counter() - start
    report = FitReport(
        str(step), error, _int8_error(layer, equations, scheme), images, steps, seconds
    )
    log.info("%s: relative error %.4f, %d steps, %.1f s", step, error, steps, seconds)
    owners = [("", layer), *((f"{n.name}.", module_of(alone, n)) for n in also if steps)]
    state = {
        owner + name: value.detach().cpu().clone()
        for owner, module in owners
        for name, value in module.state_dict().items()
    }
    return state, report


def neighbors(gm: fx.GraphModule, plan: Plan) -> dict[Step, tuple[str, ...]]:
    """The layers that are fitted with each approximate step of a plan, by name.

    They are the next ``NEIGHBORS`` layers that depend on the new one; none where another step of the plan
    replaces one of them or has it for a neighbor already.

    Args:
        gm: canonical graph of the original network.
        plan: what is to be done to it.
    """
    sites: dict[Step, tuple[str, ...]] = {}
    for step in plan.steps:
        rule = rule_named(step.rule)
        if rule.contract != "annotation" and rule.exclusive and rule.stage == "replace":
            site = rule.site_at(gm, step.anchor)
            if site is not None:
                sites[step] = site.nodes
    found: dict[Step, tuple[str, ...]] = {}
    for step, nodes in sites.items():
        if rule_named(step.rule).contract != "approximate" or is_activation(step):
            continue  # the latter are fitted one on top of the other
        near = _followers(gm, nodes)
        others = {n for s, other in sites.items() if s != step for n in other}
        others |= {n for other in found.values() for n in other}
        found[step] = () if others & set(near) else near
    return found


def _followers(gm: fx.GraphModule, nodes: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the next layers that depend on the last of some nodes."""
    after = {find(gm, nodes[-1])}
    weighted = layers(gm)
    owners = [id(module_of(gm, n).weight) for n in weighted]
    found: list[str] = []
    for node in gm.graph.nodes:
        if not after & set(node.all_input_nodes):
            continue
        after.add(node)
        if node not in weighted or node.name in nodes:
            continue
        # weights that two layers share are not those of the next one alone
        if owners.count(id(module_of(gm, node).weight)) == 1:
            found.append(node.name)
            if len(found) == NEIGHBORS:
                break
    return tuple(found)


def fitted_layer(gm: fx.GraphModule, step: Step) -> fx.Node:
    """The layer of a rewritten graph that an approximate step made.

    Raises:
        PlanError: there is none.
    """
    for node in layers(gm):
        if facts.REWRITTEN_BY.get(node) == str(step):
            return node
    raise PlanError(f"{step}: the rewritten graph has no layer of this step")


def _tuple(batch: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def _input_scale(
    gm: fx.GraphModule, name: str, batches: Batches, scheme: QuantScheme
) -> tuple[float, int]:
    """Scale and zero point of a value from its smallest and largest on the calibration inputs."""
    low, high = 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            (x,) = values(gm, (name,), _tuple(batch))
            low, high = min(low, float(x.min())), max(high, float(x.max()))
    return scheme.activations.params(low, high)


def _int8_error(layer: nn.Conv2d, equations: NormalEquations, scheme: QuantScheme) -> float:
    """The relative error with the weights as int8 holds them."""
    kept = layer.weight.detach().clone()
    layer.weight.data.copy_(rounded_weight(layer, scheme))
    error = equations.error()
    layer.weight.data.copy_(kept)
    return error


def _solve(layer: nn.Conv2d, equations: NormalEquations, scheme: QuantScheme) -> None:
    """Put the closed form into the layer, with the ridge whose rounded weights err least.

    Without a ridge, weights on inputs that hardly vary grow and stretch the scale of all others.
    """
    start = equations.weights()
    tried: list[tuple[float, float]] = []
    for ridge in RIDGES:
        equations.set_weights(start)  # the ridge pulls towards the present weights
        equations.solve(ridge)
        tried.append((_int8_error(layer, equations, scheme), ridge))
    equations.set_weights(start)
    equations.solve(min(tried)[1])
