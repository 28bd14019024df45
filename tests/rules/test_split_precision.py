from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter import Plan, PlanError, quantize, rewrite, target
from rewriter.graph import facts
from rewriter.int8.annotate import annotation
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.session import Session
from rewriter.int8.simulate import simulate
from rewriter.repair.activation_ranges import least_damage_ranges
from rewriter.rules.split_precision import SplitPrecision
from tests.rules import check

RULE = SplitPrecision()
SHAPE = (3, 9, 7)


class Uneven(nn.Module):
    """A value with channels of very different sizes, made by what the form says, read by two layers."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.norm, self.make = nn.LayerNorm(12), nn.Linear(12, 12)
        self.a, self.b = nn.Linear(12, 5), nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "norm":
            x = self.norm(x)
        elif self.form == "linear":
            x = self.make(x)
        elif self.form == "gelu":
            x = nn.functional.gelu(self.make(x))
        elif self.form == "sum":
            x = self.make(x) + self.norm(x)
        return torch.sin(self.a(x)) + torch.sin(self.b(x))


def uneven(form: str) -> nn.Module:
    """Random; the first channel is 300 times as large, and undone in the readers."""
    model = check.randomise(Uneven(form))
    with torch.no_grad():
        for layer in (model.norm, model.make):
            layer.weight[0] *= 300
            layer.bias[0] *= 300
        for layer in (model.a, model.b):
            layer.weight[:, 0] /= 300
    return model


FORMS = ("norm", "linear", "gelu", "sum")


def graph(form: str, on: str = "onnxruntime") -> tuple[fx.GraphModule, str]:
    gm = check.graph_of(uneven(form), (4, 12), on)
    found = [s for s in check.sites_of(RULE, gm) if set(s.nodes[1:]) == {"a", "b"}]
    assert len(found) == 1, list(RULE.match(gm))
    return gm, found[0].anchor


@pytest.mark.parametrize("form", FORMS)
def test_the_function_is_kept(form: str) -> None:
    gm, anchor = graph(form)
    site = RULE.site_at(gm, anchor)
    assert site is not None
    new = check.check_site(RULE, gm, site, (4, 12))
    assert check.layer_count(new) == check.layer_count(gm) + 2


def value_error(form: str, on: str, split: bool) -> float:
    """What rounding the value adds to the outputs: its readers have float weights of int8, so weights are compared away."""
    gm, anchor = graph(form, on)
    gm = gm.float()
    x = torch.cat([b.float() for b in check.calibration((4, 12))])
    new = rewrite(
        gm, Plan.parse(f"split_precision@{anchor}" if split else ""), facts={"scheme": target(on)}
    )
    q = quantize(new, target(on), [x])
    sim = simulate(q)
    parts: list[Any] = list(sim.modules())
    for module in parts:
        if hasattr(module, "layer") and hasattr(module, "spec"):
            module._rounded = module.layer.weight.detach()  # exact weights
    with torch.no_grad():
        return float((sim(x) - gm(x)).square().mean() / gm(x).square().mean())


@pytest.mark.parametrize("form", ["norm", "sum"])
@pytest.mark.parametrize("on", ["onnxruntime", "tensorrt"])
def test_the_value_is_nearly_exact(form: str, on: str) -> None:
    plain, split = (value_error(form, on, s) for s in (False, True))
    assert plain > 1e-3
    assert split < 0.02 * plain, (plain, split)


def test_better_ranges_leave_the_grid_alone_and_the_file_agrees() -> None:
    gm, anchor = graph("norm")
    gm = gm.float()
    x = torch.cat([b.float() for b in check.calibration((4, 12))])
    new = check.rewritten_by_plan(gm, f"split_precision@{anchor}")
    q = least_damage_ranges(quantize(new, target("onnxruntime"), [x]), [x])
    (node,) = [n for n in q.gm.graph.nodes if facts.GRID.known(n)]
    assert q.value_params(node) == facts.GRID.of(node)
    file = torch.from_numpy(Session(to_onnx(q)).run(x)[0])
    with torch.no_grad():
        made = simulate(q)(x)
    assert float((file - made).abs().max()) < 0.02
    halves = [n.name for n in q.gm.graph.nodes if "_rest" in n.name]
    assert len(halves) == 2
    assert all(annotation(n).weight is not None for n in q.gm.graph.nodes if n.name in halves)


def test_the_input_of_a_network() -> None:
    model = check.randomise(nn.Sequential(nn.Conv2d(3, 8, 3)))
    gm = check.graph_of(model, SHAPE, "onnxruntime")
    assert "its channels use the range" in next(iter(RULE.match(gm))).blocked
    (node,) = gm.graph.find_nodes(op="placeholder")
    low, high = facts.CHANNEL_RANGE.of(node)
    wide = torch.tensor([1.0, 1.0, 100.0])
    facts.CHANNEL_RANGE.put(node, (low * wide, high * wide))  # as if one channel were wide
    gm2 = check.graph_of(check.randomise(nn.Sequential(nn.Conv2d(5, 8, 3))), (5, 9, 7), "tflite")
    (node,) = gm2.graph.find_nodes(op="placeholder")
    low, high = facts.CHANNEL_RANGE.of(node)
    narrow = torch.tensor([1.0, 0.01, 0.01, 0.01, 0.01])
    facts.CHANNEL_RANGE.put(node, (low * narrow, high * narrow))
    (site,) = check.sites_of(RULE, gm2)
    check.check_site(RULE, gm2, site, (5, 9, 7))


@pytest.mark.parametrize(
    ("model", "on", "reason"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)),
            "onnxruntime",
            "writes int8 alone",
        ),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)), "tflite", "writes int8 alone"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1)),
            "tensorrt",
            "use the range",
        ),
    ],
)
def test_refuses(model: nn.Module, on: str, reason: str) -> None:
    check.refuses(RULE, model, reason, SHAPE, on=on)


def test_a_half_is_not_split_again_and_a_plan_twice_is_refused() -> None:
    gm, anchor = graph("norm")
    site = RULE.site_at(gm, anchor)
    assert site is not None
    new = check.check_site(RULE, gm, site, (4, 12))
    assert "it is half of a value in 16 bits" in [s.blocked for s in RULE.match(new)]
    with pytest.raises(PlanError, match="no node is called"):
        rewrite(gm, Plan.parse("split_precision@nowhere"))


def test_ignores_an_unknown_target_and_networks_without_layers() -> None:
    check.ignores(RULE, nn.Sequential(nn.Conv2d(3, 4, 1)), SHAPE)
    check.ignores(RULE, nn.Sequential(nn.ReLU()), SHAPE, on="onnxruntime")
