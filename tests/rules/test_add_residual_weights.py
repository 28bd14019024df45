from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rewriter import Plan, target
from rewriter.assemble import assemble
from rewriter.graph import facts
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.session import Session
from rewriter.rules.add_residual_weights import (
    AddResidualWeights,
    settle_residuals,
    split_weights,
    weight_spec,
)
from tests.rules import check

RULE = AddResidualWeights()
SHAPE = (3, 13, 10)


def uneven(model: nn.Module) -> nn.Module:
    """Random, with output channels of very different sizes."""
    check.randomise(model)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                size = torch.logspace(-2, 1, len(m.weight))
                m.weight.mul_(size.view(-1, *[1] * (m.weight.ndim - 1)))
            elif isinstance(m, nn.ConvTranspose2d):
                m.weight[:, 0] *= 50
    return model


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 8, 3, 2, 1), SHAPE),
        (nn.Conv2d(6, 6, (1, 3), groups=6, bias=False), (6, 9, 7)),
        (nn.ConvTranspose2d(3, 4, 2, 2), SHAPE),
        (nn.Linear(6, 9), (6,)),
        (nn.Linear(6, 9), (5, 6)),
    ],
)
def test_two_layers_make_what_one_did(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layer, nn.ReLU())
    gm = check.graph_of(uneven(model), shape, "per_tensor")
    (site,) = check.sites_of(RULE, gm)
    new = check.check_site(RULE, gm, site, shape)
    assert check.layer_count(new) == 2


class Read(nn.Module):
    """What a linear layer makes is read in float."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erf(0.01 * self.a(x))


def error(gm: torch.fx.GraphModule, text: str, x: torch.Tensor) -> float:
    """Relative error of each output, on average, in the exported file."""
    made = assemble(gm, Plan.parse(text), target("onnxruntime"), [x]).quantized
    with torch.no_grad():
        wanted = gm(x)
    missing = torch.from_numpy(Session(to_onnx(made)).run(x)[0]) - wanted
    return float((missing.square().mean(0) / wanted.square().mean(0)).mean())


def test_the_narrow_channels_come_back_in_the_file() -> None:
    """Planted: output channels of which one scale leaves a level or two; linear layers write floats, so only weights hurt."""
    gm = check.graph_of(uneven(Read()), (24,), "onnxruntime").float()
    x = check.inputs((24,), 64).float()
    plain, repaired = error(gm, "", x), error(gm, "add_residual_weights@a", x)
    assert plain > 0.02
    assert repaired < 0.01 * plain, (plain, repaired)


def test_what_is_left_over_is_computed_anew_after_scaling() -> None:
    gm = check.graph_of(uneven(nn.Sequential(nn.Conv2d(3, 8, 3))), SHAPE, "per_tensor").float()
    new = check.rewritten_by_plan(gm, "add_residual_weights@_0")
    facts.SCHEME.put(new, target("per_tensor"))
    before = {k: v.clone() for k, v in new.state_dict().items()}
    settle_residuals(new)
    for name, value in new.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-7)
    scale = torch.logspace(1, -1, 8).view(-1, 1, 1, 1)
    with torch.no_grad():
        for name in ("0", "0_rest"):
            part: Any = new.get_submodule(name)
            part.weight.mul_(scale)
    whole = gm.get_submodule("0").weight * scale
    settle_residuals(new)
    high, low = (new.get_submodule(n) for n in ("0", "0_rest"))
    torch.testing.assert_close(high.weight + low.weight, whole)
    wanted = copy.deepcopy(gm.get_submodule("0"))
    wanted.weight = nn.Parameter(whole.detach())
    (node,) = new.graph.find_nodes(op="call_module", target="0")
    again, _ = split_weights(wanted, weight_spec(new, node))
    torch.testing.assert_close(high.weight, again.weight)


def test_a_scale_for_each_channel_needs_it_only_for_outliers() -> None:
    model = uneven(nn.Sequential(nn.Conv2d(3, 8, 3)))
    check.refuses(RULE, copy.deepcopy(model), "int8 holds the weights of every channel", SHAPE)
    gm = check.graph_of(model, SHAPE, "onnxruntime")
    assert not check.sites_of(RULE, gm)
    with torch.no_grad():
        model[0].weight[3, 0, 0, 0] = 60 * model[0].weight[3].abs().max()
    gm = check.graph_of(model, SHAPE, "onnxruntime")
    assert len(check.sites_of(RULE, gm)) == 1


def test_refuses_what_is_left_over_and_layers_in_float() -> None:
    gm = check.graph_of(uneven(nn.Sequential(nn.Conv2d(3, 8, 3))), SHAPE, "per_tensor")
    new = check.check_site(RULE, gm, check.sites_of(RULE, gm)[0], SHAPE)
    assert "it is what is left over of another layer" in [s.blocked for s in RULE.match(new)]
    (node,) = gm.graph.find_nodes(op="call_module", target="0")
    facts.KEEP_FLOAT.put(node, True)
    assert [s.blocked for s in RULE.match(gm)] == ["the layer is in float"]


def test_ignores_what_has_no_weights() -> None:
    check.ignores(RULE, nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), SHAPE)
