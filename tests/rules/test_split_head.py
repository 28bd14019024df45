from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter import quantize, rewrite, target, trace
from rewriter.graph.channel_ranges import profile
from rewriter.int8.annotate import annotation
from rewriter.plan import Plan
from rewriter.rules import Site
from rewriter.rules.split_head import AUTO, SplitHead, SplitHeadNamed, split_layer
from tests.rules import check

SHAPE = (3, 12, 9)


class Detector(nn.Module):
    """One head, two anchors: 4 box channels of some hundred pixels and 5 scores, decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 18, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.relu(self.norm(self.body(x))))
        y = y.reshape(y.shape[0], 2, 9, -1).permute(0, 1, 3, 2)
        boxes, scores = y[..., :4] * 100 + 3, y[..., 4:].sigmoid()
        return torch.cat([boxes, scores], -1).flatten(1, 2)


def wide_boxes(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for first in (0, 9):
            model.head.weight[first : first + 4] *= 40
    return model


@pytest.mark.parametrize("rule", [SplitHead(2), SplitHead(3), SplitHead(4), SplitHead(AUTO)])
def test_the_function_is_kept_through_decoding(rule: SplitHead) -> None:
    gm = check.graph_of(wide_boxes(check.randomise(Detector())), SHAPE)
    (site,) = check.sites_of(rule, gm)
    check.check_site(rule, gm, site, SHAPE)


@pytest.mark.parametrize(
    "head",
    [
        nn.Conv2d(3, 9, (1, 3), stride=2, dilation=2, bias=False),
        nn.Conv2d(3, 9, 3, padding=2, padding_mode="circular"),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 9)),
    ],
)
def test_settings_of_the_last_layer(head: nn.Module) -> None:
    gm = check.graph_of(check.spread(check.randomise(nn.Sequential(head))), SHAPE)
    (site,) = check.sites_of(SplitHead(2), gm)
    check.check_site(SplitHead(2), gm, site, SHAPE)


def test_two_groups_part_boxes_and_scores() -> None:
    gm = check.graph_of(wide_boxes(check.randomise(Detector())), SHAPE)
    new = check.rewritten_by_plan(gm, "split_head_2@head")
    sizes = sorted(m.out_channels for m in new.modules() if isinstance(m, nn.Conv2d))
    assert sizes == [6, 8, 10]


def test_auto_takes_no_more_groups_than_it_needs() -> None:
    gm = check.graph_of(wide_boxes(check.randomise(Detector())), SHAPE)
    low, high = torch.full((18,), -1.0), torch.ones(18)
    for first in (0, 9):
        low[first : first + 4], high[first : first + 4] = -100.0, 100.0
    next(n for n in gm.graph.nodes if n.name == "head").meta["channel_range"] = (low, high)
    new = check.rewritten_by_plan(gm, "split_head_auto@head")
    assert check.layer_count(new) == 3


def test_auto_is_content_with_twice_the_error_of_a_range_for_each_channel() -> None:
    """Two groups leave (4 + 2 + 2 / 0.49) / 8 = 1.26 times that error, and one leaves 76 times."""
    gm = check.graph_of(check.randomise(nn.Sequential(nn.Conv2d(3, 8, 1))), SHAPE)
    high = torch.tensor([10.0, 10, 10, 10, 1, 1, 0.7, 0.7])
    node = next(n for n in gm.graph.nodes if n.op == "call_module")
    node.meta["channel_range"] = (torch.zeros(8), high)
    (site,) = SplitHead(AUTO).match(gm)
    new = check.rewritten_by_plan(gm, f"split_head_auto@{site.anchor}")
    assert check.layer_count(new) == 2


@pytest.mark.parametrize(("wider", "gains"), [(1.02, False), (1.25, True)])
def test_a_split_has_to_take_a_tenth_of_the_rounding_error_away(wider: float, gains: bool) -> None:
    """Half of the channels this much wider: their own range saves (1 - 1 / wider^2) / 2."""
    gm = check.graph_of(check.randomise(nn.Sequential(nn.Conv2d(3, 8, 1))), SHAPE)
    high = torch.tensor([1.0, wider] * 4)
    node = next(n for n in gm.graph.nodes if n.op == "call_module")
    node.meta["channel_range"] = (-high, high)
    (site,) = SplitHead(2).match(gm)
    assert ("the ranges are alike: 2 leave" in site.blocked) != gains
    assert bool(site.blocked) != gains


def test_named_groups_are_taken_as_they_are() -> None:
    gm = check.graph_of(wide_boxes(check.randomise(Detector())), SHAPE)
    boxes = [c for first in (0, 9) for c in range(first, first + 4)]
    scores = [c for c in range(18) if c not in boxes]
    gm.meta["head_groups"] = {"head": [scores, boxes]}
    (site,) = check.sites_of(SplitHeadNamed(), gm)
    check.check_site(SplitHeadNamed(), gm, site, SHAPE)
    gm.meta["head_groups"] = {"head": [scores, boxes[1:]]}
    (site,) = SplitHeadNamed().match(gm)
    assert site.blocked == "the named groups do not hold each channel once"


def test_the_groups_keep_ranges_of_their_own_up_to_the_output() -> None:
    x = check.inputs(SHAPE, 8).float()
    gm = trace(wide_boxes(check.randomise(Detector())), x[:2])
    profile(gm, [x])
    for name in ("onnxruntime", "tflite"):
        new = rewrite(gm, Plan.parse("split_head_2@head"))
        q = quantize(new, target(name), [x])
        made = [n for n in q.gm.graph.nodes if "head_group" in n.name]
        owners = {annotation(n).range_of for n in made}
        assert len(owners) == 2
        widths = sorted(q.calibration.values[o][1] - q.calibration.values[o][0] for o in owners)
        assert widths[1] > 10 * widths[0]
        (output,) = q.gm.graph.find_nodes(op="output")
        assert annotation(output).reads == ()  # what is behind the groups is float


@pytest.mark.parametrize(
    ("model", "rule", "reason"),
    [
        (nn.Conv2d(4, 8, 1, groups=2), SplitHead(2), "the convolution has 2 groups"),
        (nn.Conv2d(4, 5, 1), SplitHead(3), "5 channels are too few for 3 groups"),
        (nn.Sequential(nn.Flatten(2), nn.Linear(108, 9)), SplitHead(2), "not dimension 1"),
    ],
)
def test_refuses(model: nn.Module, rule: SplitHead, reason: str) -> None:
    check.refuses(rule, nn.Sequential(model), reason, (4, 12, 9))


def test_refuses_channels_of_like_ranges() -> None:
    gm = check.graph_of(check.randomise(nn.Sequential(nn.Conv2d(3, 8, 1))), SHAPE)
    node = next(n for n in gm.graph.nodes if n.op == "call_module")
    node.meta["channel_range"] = (torch.full((8,), -1.0), torch.ones(8))
    (site,) = SplitHead(2).match(gm)
    assert "alike" in site.blocked
    del node.meta["channel_range"]
    (site,) = SplitHead(2).match(gm)
    assert site.blocked == "no calibrated channel ranges"


def test_ignores_layers_before_other_layers() -> None:
    gm = check.graph_of(check.randomise(Detector()), SHAPE)
    assert {s.anchor for s in SplitHead(2).match(gm)} == {"head"}


class LosesTheOrder(SplitHead):
    """A planted fault: the channels come back in the order of the groups."""

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        node = next(n for n in gm.graph.nodes if n.name == site.anchor)
        split_layer(gm, node, self._groups(gm, node), site)
        for name, buffer in list(gm.named_buffers()):
            if name.endswith("_order"):
                buffer.copy_(torch.arange(len(buffer)))


def test_a_lost_channel_order_is_found() -> None:
    gm = check.graph_of(wide_boxes(check.randomise(Detector())), SHAPE)
    (site,) = check.sites_of(SplitHead(2), gm)
    with pytest.raises(AssertionError):
        check.check_site(LosesTheOrder(2), gm, site, SHAPE)
