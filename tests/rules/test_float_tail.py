from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter import quantize, target
from rewriter.int8.annotate import annotation
from rewriter.rules.float_tail import FloatTail
from tests.rules import check

RULE = FloatTail()
SHAPE = (3, 12, 9)


class Decoding(nn.Module):
    """Boxes and scores from heads of their own, concatenated; a gate that is no tail."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes, self.scores = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, 4, 1),
            nn.Conv2d(6, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y = y * y.sigmoid().mean((2, 3), keepdim=True)
        return torch.cat([self.boxes(y) * 300, self.scores(y).sigmoid()], 1).flatten(2)


def test_nothing_in_the_graph_changes() -> None:
    new = check.rewrites(RULE, Decoding(), SHAPE)
    kept = {n.name for n in new.graph.nodes if n.meta.get("keep_float")}
    assert any("cat" in name for name in kept)
    assert any("flatten" in name for name in kept)
    assert not any(name.startswith(("body", "mean")) for name in kept)


def test_the_heads_are_int8_and_what_follows_is_not() -> None:
    gm = check.graph_of(check.randomise(Decoding()), SHAPE).float()
    for name in ("onnxruntime", "tflite"):
        q = quantize(
            check.rewritten_by_plan(gm, "float_tail@output"),
            target(name),
            [check.inputs(SHAPE).float()],
        )
        notes = {n.name: annotation(n) for n in q.gm.graph.nodes}
        assert notes["boxes"].weight is not None
        assert notes["scores"].weight is not None
        assert notes["cat"].output is None
        assert notes["output"].reads == ()


def test_ignores_a_network_that_ends_in_a_layer() -> None:
    check.ignores(RULE, nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), SHAPE)
