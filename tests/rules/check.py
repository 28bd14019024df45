"""What a rule's contract says, as two assertions: ``rewrites`` and ``refuses``."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from rewriter import Plan, Step, profile, rewrite, target, trace
from rewriter.graph.edit import copy_graph
from rewriter.graph.interpret import walk
from rewriter.graph.lookup import layers
from rewriter.rules import RewriteRule, Site

SEED = 20
M = TypeVar("M", bound=nn.Module)


def randomise(model: M, seed: int = SEED) -> M:
    """Random, non-symmetric weights and batch norm statistics, in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, scale: float, shift: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * scale + shift

    with torch.no_grad():
        for name, p in model.named_parameters():
            fan = max(1, p[0].numel()) if p.ndim > 1 else 1
            p.copy_(draw(p, fan**-0.5, 0.05) if p.ndim > 1 else draw(p, 0.3, 0.1))
            if name.endswith("weight") and p.ndim == 1:
                p.copy_(p.abs() + 0.2)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(draw(b, 0.3, 0.1))
            elif name.endswith("running_var"):
                b.copy_(draw(b, 0.3, 0.0).abs() + 0.5)
    return model.eval()


def inputs(shape: tuple[int, ...], count: int = 3, seed: int = SEED) -> Tensor:
    """(count, *shape) random inputs in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def calibration(shape: tuple[int, ...]) -> list[Tensor]:
    """What graphs are profiled on; it holds the inputs of the checks.

    Some rules are exact in the calibrated range alone.
    """
    return [inputs(shape), inputs(shape, 4)]


def graph_of(model: nn.Module, shape: tuple[int, ...], on: str = "") -> fx.GraphModule:
    """The profiled canonical graph of a model, in float64; ``on`` which target, where rules are to know."""
    gm = trace(model, inputs(shape).float()).double()
    if on:
        gm.meta["scheme"] = target(on)
    profile(gm, calibration(shape))
    return gm


def sites_of(rule: RewriteRule, gm: fx.GraphModule) -> list[Site]:
    return [s for s in rule.match(gm) if not s.blocked]


def flat(value: Tensor | tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def rewrites(
    rule: RewriteRule,
    model: nn.Module,
    shape: tuple[int, ...],
    sites: int | None = 1,
    on: str = "",
) -> fx.GraphModule:
    """Assert everything that the rule's contract says at each of its sites in ``model``.

    Returns:
        The graph rewritten at the first site.
    """
    gm = graph_of(randomise(model), shape, on)
    found = sites_of(rule, gm)
    if sites is not None:
        assert len(found) == sites, list(rule.match(gm))
    rewritten = [check_site(rule, gm, site, shape) for site in found]
    return rewritten[0]


def check_site(
    rule: RewriteRule, gm: fx.GraphModule, site: Site, shape: tuple[int, ...]
) -> fx.GraphModule:
    """Assert the contract at one site: apply the rule alone, on a copy of the graph."""
    x = inputs(shape)
    code, state = gm.code, {k: v.clone() for k, v in gm.state_dict().items()}
    meta = {n.name: set(n.meta) for n in gm.graph.nodes}
    plan = Plan((Step(site.rule, site.anchor),))
    assert Plan.parse(str(plan)) == plan
    expected = flat(gm(x))
    # the rule under test, which need not be the one of the catalog, on a copy made as rewrite()
    # does
    new = copy_graph(gm)
    rule.apply(new, site)
    new.graph.eliminate_dead_code()
    new.delete_all_unused_submodules()
    new.graph.lint()
    new.recompile()
    outputs = flat(new(x))
    assert gm.code == code, "the source graph was edited"
    assert meta == {n.name: set(n.meta) for n in gm.graph.nodes}, "the source's meta was edited"
    for name, tensor in gm.state_dict().items():
        assert torch.equal(tensor, state[name]), f"the source's {name} was edited"
    assert len(outputs) == len(expected)
    for a, b in zip(outputs, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert bool(torch.isfinite(a).all())
    if rule.contract == "annotation":
        assert new.code == code
    elif site.anchor != "model":  # a rule for all layers at once may find nothing to improve
        # other code, another kind of module, or other weights
        assert (
            new.code != code
            or str(new) != str(gm)
            or any(not torch.equal(v, state[k]) for k, v in new.state_dict().items() if k in state)
        ), f"{site}: nothing was rewritten"
    if rule.contract in ("exact", "annotation"):
        for a, b in zip(outputs, expected, strict=True):
            scale = float(b.abs().max())
            error = float((a - b).abs().max())
            assert error <= 1e-9 * scale, f"{site}: differs by {error:.3g} of {scale:.3g}"
    for node in new.graph.nodes:
        if node.op == "call_module":
            assert "shape" in node.meta, node.name
    assert_shapes(new, x)
    return new


def assert_shapes(gm: fx.GraphModule, x: Tensor) -> None:
    """What the nodes' meta says about shapes is what they compute."""
    for node, value in walk(gm, (x[:1],)):
        if isinstance(value, Tensor) and node.op not in ("get_attr", "placeholder"):
            said = tuple(node.meta["shape"])
            assert said == tuple(value.shape), f"{node.name}: {said} != {tuple(value.shape)}"


def refuses(
    rule: RewriteRule, model: nn.Module, reason: str, shape: tuple[int, ...], on: str = ""
) -> None:
    """Assert that the rule has no site in ``model``, but a near miss with this reason."""
    gm = graph_of(randomise(model), shape, on)
    assert not sites_of(rule, gm)
    reasons = [s.blocked for s in rule.match(gm)]
    assert any(reason in r for r in reasons), reasons


def ignores(rule: RewriteRule, model: nn.Module, shape: tuple[int, ...], on: str = "") -> None:
    """Assert that the rule sees nothing in ``model``, not even a near miss."""
    assert not list(rule.match(graph_of(randomise(model), shape, on)))


def layer_count(gm: fx.GraphModule) -> int:
    return len(layers(gm))


def spread(model: nn.Module, factor: float = 30.0) -> nn.Module:
    """A copy whose convolutions have every third output channel ``factor`` times as large."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                m.weight[::3] *= factor
                if m.bias is not None:
                    m.bias[::3] *= factor
            elif isinstance(m, nn.ConvTranspose2d):
                m.weight[:, ::3] *= factor
    return model


def rewritten_by_plan(gm: fx.GraphModule, *steps: str) -> fx.GraphModule:
    return rewrite(gm, Plan.parse(" ".join(steps)))
