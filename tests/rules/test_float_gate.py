from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter import quantize, target
from rewriter.int8.annotate import annotation
from rewriter.rules.float_gate import FloatGate
from tests.rules import check

RULE = FloatGate()
SHAPE = (3, 9, 7)


class Gated(nn.Module):
    """A convolution, a gate, a reader; the gate in one of the forms that networks have."""

    def __init__(self, form: str = "mean", layers: int = 2) -> None:
        super().__init__()
        self.form = form
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(8, 8 if layers == 1 else 2, 1), nn.Conv2d(2, 8, 1)
        self.first, self.second = nn.Linear(8, 2), nn.Linear(2, 8)
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.form == "linear":
            g = self.second(self.first(self.pool(x).flatten(1)).relu()).sigmoid()
            return self.b(x * g[:, :, None, None])
        g = self.pool(x) if self.form == "pool" else x.mean((2, 3), keepdim=True)
        g = self.down(g).relu()
        if self.layers == 2:
            g = self.up(g)
        g = nn.functional.hardsigmoid(g) if self.form == "hard" else g.sigmoid()
        return self.b(g * x)


@pytest.mark.parametrize("form", ["mean", "pool", "hard"])
def test_every_form_is_found_and_the_code_stays(form: str) -> None:
    new = check.rewrites(RULE, Gated(form), SHAPE)
    kept = {n.name for n in new.graph.nodes if n.meta.get("keep_float")}
    assert {"down", "up"} <= kept
    assert not {"a", "b"} & kept


def test_gates_of_linear_layers() -> None:
    gm = check.graph_of(check.randomise(Gated("linear")), SHAPE)
    (site,) = RULE.match(gm)
    assert site.nodes[:2] == ("first", "second")


def test_one_layer_makes_a_gate_as_well() -> None:
    check.rewrites(RULE, Gated(layers=1), SHAPE)


@pytest.mark.parametrize("on", ["onnxruntime", "tensorrt", "tflite"])
def test_the_gate_and_the_product_stay_in_int8(on: str) -> None:
    gm = check.graph_of(check.randomise(Gated()), SHAPE, on).float()
    new = check.rewritten_by_plan(gm, "float_gate@down")
    notes = {
        n.name: annotation(n)
        for n in quantize(new, target(on), [check.inputs(SHAPE).float()]).gm.graph.nodes
    }
    assert notes["down"].weight is None
    assert notes["up"].weight is None
    assert notes["a"].weight is not None
    assert notes["mul"].output is not None
    assert len(notes["mul"].reads) == 2


def test_a_gate_in_float_is_a_near_miss() -> None:
    gm = check.graph_of(check.randomise(Gated()), SHAPE)
    new = check.rewritten_by_plan(gm, "float_gate@down")
    assert [s.blocked for s in RULE.match(new)] == ["the gate is in float already"]


class Product(nn.Module):
    """Products that are no gates."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x).sigmoid()


def test_ignores_other_products() -> None:
    check.ignores(RULE, Product(), SHAPE)
