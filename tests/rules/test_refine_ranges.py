from __future__ import annotations

from torch import nn

from rewriter.rules.refine_ranges import RefineRanges
from tests.rules import check


def test_only_asks_for_refined_ranges() -> None:
    gm = check.rewrites(RefineRanges(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 7, 6))
    assert gm.meta["repairs"] == {"ranges"}
