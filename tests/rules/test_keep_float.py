from __future__ import annotations

from torch import nn

from rewriter.int8.annotate import annotate, annotation
from rewriter.int8.scheme import target
from rewriter.rules.keep_float import KeepFloat
from tests.rules import check

RULE = KeepFloat()


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1))


def test_every_layer_is_a_site_and_the_code_stays() -> None:
    check.rewrites(RULE, two_layers(), (3, 9, 7), sites=2)


def test_the_layer_and_nothing_else_is_float() -> None:
    gm = check.graph_of(check.randomise(two_layers()), (3, 9, 7)).float()
    annotate(gm, target("per_tensor"))
    kept = check.rewritten_by_plan(gm, "keep_float@_2").float()
    annotate(kept, target("per_tensor"))
    notes = {n.name: annotation(n) for n in kept.graph.nodes}
    assert notes["_2"].weight is None
    assert notes["_2"].reads == ()
    assert notes["_0"].weight is not None
    assert notes["_0"].reads


def test_a_layer_that_was_split_is_float_as_a_whole() -> None:
    gm = check.graph_of(check.spread(check.randomise(two_layers())), (3, 9, 7)).float()
    gm = check.rewritten_by_plan(gm, "split_range_2@_0", "keep_float@_2")
    kept = [n.name for n in gm.graph.nodes if n.meta.get("keep_float")]
    assert len(kept) == 2  # both parts of the reader, not the layer that was split


def test_ignores_a_network_without_layers() -> None:
    check.ignores(RULE, nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), (3, 8, 8))
