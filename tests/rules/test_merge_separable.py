from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from rewriter import Plan, PlanError, rewrite
from rewriter.rules import Site
from rewriter.rules.merge_separable import (
    MergeLinearSeparable,
    MergeSeparable,
    merged_convolution,
)
from tests.rules import check

SHAPE = (4, 11, 8)
SETTINGS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "padding": (2, 0), "stride": 2},
    {"kernel_size": (2, 3), "dilation": 2, "bias": False},
    {"kernel_size": 5, "padding": "same", "dilation": (1, 2)},
]


def separable(
    channels: int = 4, out: int = 6, act: nn.Module | None = None, **kw: Any
) -> nn.Module:
    depthwise = nn.Conv2d(channels, channels, groups=channels, **kw)
    between = [] if act is None else [act]
    return nn.Sequential(depthwise, *between, nn.Conv2d(channels, out, 1))


@pytest.mark.parametrize("setting", SETTINGS)
def test_without_an_activation_the_product_is_exact(setting: dict[str, Any]) -> None:
    check.rewrites(MergeLinearSeparable(), separable(**setting), SHAPE)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("act", [nn.ReLU6(), nn.SiLU(), nn.PReLU(4)])
def test_with_an_activation_the_shapes_are_kept(setting: dict[str, Any], act: nn.Module) -> None:
    new = check.rewrites(MergeSeparable(), separable(act=act, **setting), SHAPE)
    assert check.layer_count(new) == 1


def test_batch_norms_between_are_folded_and_no_obstacle() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)
    )
    check.rewrites(MergeSeparable(), model, SHAPE)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dw, self.pw = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 5, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.dw(x)
        return self.pw(y), y


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 3, 1)), "depth multiplier is 2"),
        (separable(kernel_size=3, padding=1, padding_mode="reflect"), "padding mode is reflect"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, (1, 3))), "is 1 x 3"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1, groups=2)), "2 groups"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1, stride=2)), "a stride"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1, padding=1)), "padding"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU()), "output follows"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.MaxPool2d(2)), "stands between"),
        (Twice(), "is read by 2 nodes"),
    ],
)
def test_refuses(model: nn.Module, reason: str) -> None:
    check.refuses(MergeSeparable(), model, reason, SHAPE)


def test_ignores_other_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 3, 1))
    check.ignores(MergeSeparable(), model, SHAPE)
    check.ignores(MergeLinearSeparable(), model, SHAPE)


def test_one_depthwise_layer_is_merged_once() -> None:
    gm = check.graph_of(check.randomise(separable(act=nn.ReLU(), kernel_size=3)), SHAPE)
    with pytest.raises(PlanError, match="merge_separable@_0"):
        rewrite(gm, Plan.parse("merge_separable@_0 keep_float@_0"))


# ------------------------------------------------------------ faults that the checks must find


class Faulty(MergeLinearSeparable):
    """The rule with one thing done wrong to the merged layer, or to the source."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        if self.fault == "edits its argument":
            gm.get_parameter("0.weight").data.mul_(1.5)
        before = {n.name: n for n in gm.graph.nodes}
        depthwise, pointwise = before[site.nodes[0]], before[site.nodes[-1]]
        shared = gm.get_submodule(str(depthwise.target))
        merged = merged_convolution(shared, gm.get_submodule(str(pointwise.target)))
        with torch.no_grad():
            _spoil(merged, self.fault)
        gm.set_submodule(str(pointwise.target), merged)
        pointwise.replace_input_with(pointwise.args[0], depthwise.args[0])
        gm.graph.erase_node(depthwise)


def _spoil(m: nn.Conv2d, fault: str) -> None:
    match fault:
        case "mirrored":
            m.weight.copy_(m.weight.flip(3))
        case "transposed":
            m.weight.copy_(m.weight.transpose(2, 3).clone())
        case "bias dropped":
            m.bias.zero_()
        case "doubled":
            m.weight.mul_(2)
        case "channels rolled":
            m.weight.copy_(m.weight.roll(1, 0).clone())
        case "leak":
            m.weight[0, 1, 0, 0] += 1e-6
        case "float32":
            m.weight.copy_(m.weight.float().double())
        case "dilation lost":
            m.dilation, m.padding = (1, 1), (1, 1)
        case "stride lost":
            m.stride = (1, 1)
        case "nan":
            m.weight[0, 0, 0, 0] = float("nan")
        case _:
            assert fault == "none"


@pytest.mark.parametrize(
    "fault",
    [
        "mirrored",
        "transposed",
        "bias dropped",
        "doubled",
        "channels rolled",
        "leak",
        "float32",
        "dilation lost",
        "stride lost",
        "nan",
    ],
)
def test_a_planted_fault_is_found(fault: str) -> None:
    model = separable(kernel_size=3, dilation=2, padding=2, stride=2)
    with pytest.raises(AssertionError):
        check.rewrites(Faulty(fault), model, (4, 11, 13))


def test_without_a_fault_the_same_rule_passes() -> None:
    model = separable(kernel_size=3, dilation=2, padding=2, stride=2)
    check.rewrites(Faulty("none"), model, (4, 11, 13))


class EditsTheSource(MergeLinearSeparable):
    def __init__(self, source: list[fx.GraphModule]) -> None:
        self.source = source

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        super().apply(gm, site)
        self.source[0].get_parameter("1.weight").data.mul_(1.01)


def test_an_edit_of_the_source_is_found() -> None:
    gm = check.graph_of(check.randomise(separable(kernel_size=3)), SHAPE)
    rule = EditsTheSource([gm])
    (site,) = check.sites_of(rule, gm)
    with pytest.raises(AssertionError, match="source"):
        check.check_site(rule, gm, site, SHAPE)
