from __future__ import annotations

from torch import nn

from rewriter.rules.correct_bias import CorrectBias
from tests.rules import check


def test_only_asks_for_corrected_biases() -> None:
    gm = check.rewrites(CorrectBias(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 7, 6))
    assert gm.meta["repairs"] == {"biases"}


def test_refuses_a_network_without_weights() -> None:
    check.refuses(CorrectBias(), nn.Sequential(nn.ReLU()), "no layer has weights", (3, 7, 6))
