from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter import cost
from rewriter.rules.lower_resolution import SIDES, LowerResolution
from tests.rules import check

RULE = LowerResolution(SIDES[1])
SHAPE = (3, 96, 88)


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def test_a_classifier_reads_smaller_images_of_the_same_input() -> None:
    new = check.rewrites(RULE, classifier(), SHAPE)
    shapes = [n.meta["shape"] for n in new.graph.nodes if n.name in ("x", "input", "resize")]
    assert (1, 3, 80, 72) in shapes
    assert (1, 3, 96, 88) in [n.meta["shape"] for n in new.graph.nodes if n.op == "placeholder"]
    old = check.graph_of(check.randomise(classifier()), SHAPE)
    assert cost(new.float()).macs < 0.8 * cost(old.float()).macs


@pytest.mark.parametrize("percent", SIDES)
def test_it_is_the_network_on_the_resized_image(percent: int) -> None:
    gm = check.graph_of(check.randomise(classifier()), SHAPE)
    (site,) = check.sites_of(LowerResolution(percent), gm)
    new = check.rewritten_by_plan(gm, f"{site.rule}@{site.anchor}")
    x = check.inputs(SHAPE)
    size = next(tuple(n.meta["shape"][2:]) for n in new.graph.nodes if n.name == "resize")
    small = nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(new(x), gm(small))


class Grid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 1, 1), nn.Linear(96 * 88, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Grid(), "its output would have the shape"), (Fixed(), "cannot be run at")],
)
def test_near_misses(model: nn.Module, reason: str) -> None:
    check.refuses(LowerResolution(SIDES[0]), model, reason, SHAPE)


def test_small_images_and_vectors_are_left_alone() -> None:
    check.ignores(RULE, classifier(), (3, 32, 32))
    check.ignores(RULE, nn.Linear(6, 4), (6,))
