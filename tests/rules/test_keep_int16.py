from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rewriter import RULES, Plan, PlanError, find_sites, rewrite, target
from rewriter.graph import facts
from rewriter.int8.annotate import annotate, annotation
from rewriter.rules.keep_int16 import KeepInt16
from tests.rules import check

RULE = KeepInt16()
SHAPE = (3, 9, 7)


def two_layers(act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), act or nn.ReLU(), nn.Conv2d(6, 4, 1))


def bits(gm: torch.fx.GraphModule, on: str = "qnn") -> dict[str, int]:
    """How many bits each stored value has."""
    annotate(gm, target(on))
    outputs = {n.name: annotation(n).output for n in gm.graph.nodes}
    return {name: spec.bits for name, spec in outputs.items() if spec is not None}


def kept(model: nn.Module, *steps: str) -> dict[str, int]:
    gm = check.graph_of(check.randomise(model), SHAPE, "qnn").float()
    return bits(check.rewritten_by_plan(gm, *steps))


def test_every_layer_is_a_site_and_the_code_stays() -> None:
    check.rewrites(RULE, two_layers(), SHAPE, sites=2, on="qnn")
    check.rewrites(RULE, nn.Linear(3, 2), (3,), sites=1, on="qnn")


@pytest.mark.parametrize(
    ("act", "wide"),
    [
        (nn.ReLU(), {"_1"}),  # a clip is computed inside the layer
        (nn.ReLU6(), {"_1"}),
        (nn.SiLU(), {"_0", "_1"}),
        (nn.LeakyReLU(), {"_0", "_1"}),
        (nn.Sigmoid(), {"_0"}),  # 256 levels of [0, 1] are enough
        (nn.Tanh(), {"_0"}),
        (nn.MaxPool2d(2), {"_0", "_1"}),  # moves what it reads
        (nn.AvgPool2d(2), {"_0"}),
    ],
)
def test_the_value_behind_the_layer_has_16_bits_and_no_other(
    act: nn.Module, wide: set[str]
) -> None:
    found = kept(two_layers(act), "keep_int16@_0")
    assert {name for name, b in found.items() if b == 16} == wide
    assert found["input_1"] == found["_2"] == 8


class Shared(nn.Module):
    """One layer's value is read by an activation, a sum and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) + self.act(x)


def test_an_activation_beside_other_readers_keeps_8_bits() -> None:
    assert {n for n, b in kept(Shared(), "keep_int16@a").items() if b == 16} == {"a"}


def test_the_site_names_the_layers_that_read_the_value() -> None:
    gm = check.graph_of(check.randomise(Shared()), SHAPE, "qnn")
    assert [s.readers for s in RULE.match(gm)] == [("b",), ()]
    gm = check.graph_of(check.randomise(two_layers(nn.SiLU())), SHAPE, "qnn")
    assert [s.readers for s in RULE.match(gm)] == [("_2",), ()]


def test_a_layer_that_was_split_has_16_bits_as_a_whole() -> None:
    gm = check.graph_of(check.spread(check.randomise(two_layers())), SHAPE, "qnn").float()
    gm = check.rewritten_by_plan(gm, "split_range_2@_0", "keep_int16@_0")
    marked = [n.name for n in gm.graph.nodes if n.meta.get("keep_int16")]
    assert len(marked) == 2
    assert list(bits(gm).values()).count(16) == 2


class Head(nn.Module):
    """A linear layer whose result is computed with in float: its kernel writes floats."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(self.b(self.a(x).mean((2, 3))))


def test_refuses_a_value_that_is_read_in_float() -> None:
    gm = check.graph_of(check.randomise(Head()), SHAPE, "qnn")
    # a target with 16-bit values whose linear layers may write floats, as ONNX Runtime's do
    facts.SCHEME.put(gm, replace(target("onnxruntime"), wide=target("qnn").wide))
    reasons = {s.anchor: s.blocked for s in RULE.match(gm)}
    assert reasons == {"a": "", "b": "its value is not stored in int8: it is read in float"}
    with pytest.raises(PlanError, match="keep_int16@b: not applicable: its value is not stored"):
        rewrite(gm, Plan.parse("keep_int16@b"))


def test_refuses_a_layer_in_float() -> None:
    gm = check.graph_of(check.randomise(two_layers()), SHAPE, "qnn")
    gm = check.rewritten_by_plan(gm, "keep_float@_0")
    assert [s.blocked for s in RULE.match(gm)] == ["the layer is in float", ""]
    with pytest.raises(PlanError, match="both change _0"):
        rewrite(
            check.graph_of(two_layers().eval(), SHAPE, "qnn"),
            Plan.parse("keep_float@_0 keep_int16@_0"),
        )


@pytest.mark.parametrize("name", ["onnxruntime", "per_tensor", "tensorrt", "tflite"])
def test_targets_without_16_bits_know_nothing_of_it(name: str) -> None:
    """No site and no near miss; a plan that asks for it all the same is told why not."""
    check.ignores(RULE, two_layers(), SHAPE, on=name)
    gm = check.graph_of(check.randomise(two_layers()), SHAPE, name)
    assert [s.rule for s in find_sites(gm)].count("keep_float") == 2
    with pytest.raises(PlanError, match=f"not applicable: target {name}: no 16-bit activations"):
        rewrite(gm, Plan.parse("keep_int16@_0"))
    # what was marked on another target changes nothing here
    marked = check.graph_of(check.randomise(two_layers()), SHAPE, "qnn").float()
    marked = check.rewritten_by_plan(marked, "keep_int16@_0")
    assert set(bits(marked, name).values()) == {8}


def test_without_a_target_a_plan_is_told_so() -> None:
    check.ignores(RULE, two_layers(), SHAPE)
    gm = check.graph_of(check.randomise(two_layers()), SHAPE)
    with pytest.raises(PlanError, match="no target is given: no 16-bit activations"):
        rewrite(gm, Plan.parse("keep_int16@_0"))
    made = rewrite(gm, Plan.parse("keep_int16@_0"), facts={"scheme": target("qnn")})
    assert {n.name for n in made.graph.nodes if n.meta.get("keep_int16")} == {"_0"}
    with pytest.raises(PlanError, match="no node is called 'nowhere'"):
        rewrite(gm, Plan.parse("keep_int16@nowhere"))


def test_it_comes_before_keep_float_and_after_what_makes_layers() -> None:
    names = [rule.name for rule in RULES]
    assert names[-2:] == ["keep_int16", "keep_float"]


def test_ignores_a_network_without_layers() -> None:
    check.ignores(RULE, nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), (3, 8, 8), on="qnn")
