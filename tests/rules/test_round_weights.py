from __future__ import annotations

from torch import nn

from rewriter import Plan, rewrite
from rewriter.rules.round_weights import RoundWeights
from tests.rules import check

NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


def test_only_asks_for_rounding_and_adds_to_what_was_asked() -> None:
    gm = check.rewrites(RoundWeights(), NET, (3, 7, 6))
    assert gm.meta["repairs"] == {"rounding"}
    gm = check.graph_of(check.randomise(NET), (3, 7, 6))
    both = rewrite(gm, Plan.parse("round_weights@model correct_bias@model"))
    assert both.meta["repairs"] == {"rounding", "biases"}
    assert "repairs" not in gm.meta


def test_refuses_a_network_without_such_layers() -> None:
    reason = "no convolution or linear layer"
    check.refuses(RoundWeights(), nn.Sequential(nn.ConvTranspose2d(3, 4, 2)), reason, (3, 7, 6))
