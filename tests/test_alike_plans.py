"""Plans that differ at a place take over what is the same, and come out as from nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter import Plan, PlanError, find_sites, profile, rewrite, target, trace
from rewriter import assemble as module
from rewriter.assemble import assemble
from rewriter.damage.measured import changed_nodes, measure, measure_changed
from rewriter.graph import facts
from rewriter.graph.lookup import layers, module_of
from rewriter.int8.simulate import Quantized
from rewriter.plan import rule_named
from rewriter.repair import alike, bias_and_rounding
from tests.networks import SIZE
from tests.networks import network as random_network
from tests.rules import check

SHAPE = (3, 12, 13)
REPAIRS = "equalize@model refine_ranges@model correct_bias@model round_weights@model"


class Uneven(nn.Module):
    """Two branches; a few channels of the first layer are much wider than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, groups=12)
        self.left, self.right = nn.Conv2d(12, 10, 1), nn.Conv2d(12, 10, 1)
        self.join, self.head = nn.Conv2d(10, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.deep(nn.functional.silu(self.stem(x))))
        x = torch.relu(self.left(x)) + torch.relu(self.right(x))
        return self.head(torch.relu(self.join(x)).mean((2, 3)))


@pytest.fixture
def batches() -> tuple[Tensor, ...]:
    return check.inputs(SHAPE, 24).float().split(12)


def made(batches: tuple[Tensor, ...]) -> fx.GraphModule:
    model = check.randomise(Uneven())
    with torch.no_grad():
        model.stem.weight *= torch.logspace(-2, 1, 12).view(-1, 1, 1, 1)
    gm = trace(model, batches[0][:2])
    profile(gm, batches)
    return gm


def same(a: Quantized, b: Quantized) -> bool:
    one, other = a.gm.state_dict(), b.gm.state_dict()
    mine, its = a.calibration, b.calibration
    return (
        one.keys() == other.keys()
        and all(torch.equal(one[k], other[k]) for k in one)
        and mine.values == its.values
        and all(torch.equal(mine.weights[k], its.weights[k]) for k in mine.weights)
    )


def single_steps(gm: fx.GraphModule) -> list[str]:
    found = [s for s in find_sites(gm) if not s.blocked and s.anchor != "model"]
    return [f"{s.rule}@{s.anchor}" for s in found if rule_named(s.rule).contract != "approximate"]


@pytest.mark.parametrize("target_name", ["per_tensor", "onnxruntime"])
def test_a_plan_comes_out_as_from_nothing_whatever_was_scored_before(
    batches: tuple[Tensor, ...], target_name: str, tmp_path: Path
) -> None:
    gm, scheme = made(batches), target(target_name)
    steps = single_steps(gm)
    assert any(s.startswith("keep_float") for s in steps)
    assert any(s.startswith("split_") for s in steps)
    split = next(s for s in steps if s.startswith("split_"))
    for step in (steps[0], split):
        plan = Plan.parse(f"{step} {REPAIRS}")
        expected = assemble(made(batches), plan, scheme, batches).quantized
        for other in (REPAIRS, f"{steps[-1]} {REPAIRS}", f"{split} equalize@model"):
            assemble(gm, Plan.parse(other), scheme, batches, tmp_path)
        assert same(assemble(gm, plan, scheme, batches, tmp_path).quantized, expected)
        assert same(assemble(made(batches), plan, scheme, batches, tmp_path).quantized, expected)


def test_weights_are_rounded_again_where_the_place_has_changed_the_errors(
    batches: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, scheme = made(batches), target("onnxruntime")
    assemble(gm, Plan.parse(REPAIRS), scheme, batches)
    base = module._alike(gm, Plan.parse(REPAIRS), scheme, batches, None)
    assert base is not None
    before, rounded = bias_and_rounding._round, []

    def watched(quantized: Quantized, node: fx.Node, *rest: object) -> None:
        rounded.append(node.name)
        before(quantized, node, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(bias_and_rounding, "_round", watched)
    last = layers(gm)[-1].name
    plan = Plan.parse(f"keep_float@{last} {REPAIRS}")
    found = assemble(gm, plan, scheme, batches).quantized
    assert rounded == ["join"]  # its scales followed those of the layer that int8 has left
    for node in layers(found.gm):
        if node.name not in (last, "join"):
            like = next(n for n in layers(base.repaired.gm) if n.name == node.name)
            mine, its = (module_of(g, n) for g, n in ((found.gm, node), (base.repaired.gm, like)))
            assert torch.equal(mine.weight, its.weight), node.name
            assert facts.NOISE.of(node) == facts.NOISE.of(like)
    rounded.clear()
    monkeypatch.setattr(alike, "ALIKE", 1.0 - 1e-9)
    assemble(made(batches), plan, scheme, batches)
    assert (
        len(rounded) == 2 * len(layers(gm)) - 1
    )  # those of the network itself, then all but one again


@pytest.mark.parametrize("seed", range(16))
def test_what_exact_steps_leave_alone_is_known_and_true(seed: int) -> None:
    x = torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(seed))
    gm = trace(random_network(seed), x[:2])
    profile(gm, [x])
    measure(gm, [x], None, again=False)
    for step in single_steps(gm)[seed % 3 :: 3]:
        try:
            new = rewrite(gm, Plan.parse(step), facts={"scheme": target("per_tensor")})
        except PlanError:
            continue
        changed = {n.name for n in changed_nodes(new, gm)}
        measure_changed(new, gm, [x], None)
        anew = rewrite(gm, Plan.parse(step), facts={"scheme": target("per_tensor")})
        for node in anew.graph.nodes:
            facts.CHANNEL_RANGE.drop(node)
        profile(anew, [x])
        for node, fresh in zip(new.graph.nodes, anew.graph.nodes, strict=True):
            if not facts.CHANNEL_RANGE.known(fresh):
                continue
            where = f"{step} {node.name} {node.name in changed}"
            known, seen = facts.CHANNEL_RANGE.get(node), facts.CHANNEL_RANGE.of(fresh)
            assert known is not None, where
            for a, b in zip(known, seen, strict=True):
                size = float(torch.stack(seen).abs().max())
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * size + 1e-6, msg=where)
