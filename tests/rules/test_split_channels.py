from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter import quantize, target
from rewriter.rules.split_channels import SplitChannels
from tests.rules import check

RULE = SplitChannels()
SHAPE = (3, 13, 10)


def outlier(model: nn.Module, layer: str = "0", channel: int = 5) -> nn.Module:
    """The model, random, with one output channel of one layer ten times as large."""
    check.randomise(model)
    with torch.no_grad():
        for p in model.get_submodule(layer).parameters():
            p[channel] *= 10
    return model


def checked(model: nn.Module, sites: int = 1) -> None:
    gm = check.graph_of(model, SHAPE)
    found = check.sites_of(RULE, gm)
    assert len(found) >= sites, list(RULE.match(gm))
    for site in found:
        check.check_site(RULE, gm, site, SHAPE)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.3), nn.PReLU(8), nn.Identity()])
def test_homogeneous_activations_are_passed(act: nn.Module) -> None:
    checked(outlier(nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Conv2d(8, 4, (1, 3), stride=2))))


@pytest.mark.parametrize(
    "between",
    [
        nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=3)),
    ],
)
def test_channelwise_layers_are_passed(between: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), between, nn.Conv2d(8, 4, 1))
    checked(outlier(model))


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.c(x + self.b(x))


def test_sums_are_passed_when_both_sides_are_split() -> None:
    model = outlier(Skip(), "a")
    with torch.no_grad():
        for p in model.get_submodule("b").parameters():
            p[5] *= 100  # the same channel on both sides
    checked(model)


def test_the_range_is_halved() -> None:
    model = outlier(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    gm = check.graph_of(model, SHAPE).float()
    x = check.inputs(SHAPE, 4).float()
    spans: list[float] = []
    for steps in ((), ("split_channels@_0",)):
        q = quantize(check.rewritten_by_plan(gm, *steps), target("onnxruntime"), [x])
        low, high = q.calibration.values["_1"]
        spans.append(high - low)
    assert spans[1] == pytest.approx(spans[0] / 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1)), "does not give half"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "is no dense layer"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 9, 1)), "wider than half"),
    ],
)
def test_refuses(model: nn.Module, reason: str) -> None:
    check.refuses(RULE, model, reason, SHAPE)


def test_ignores_a_network_without_dense_layers() -> None:
    check.ignores(RULE, nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU()), SHAPE)
