"""Ranges are cut to what their readers can tell, and never at the cost of an order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewriter import quantize, simulate, target, trace
from rewriter.damage import declared, measure_fidelity
from rewriter.graph.lookup import outputs
from rewriter.int8.annotate import annotation
from rewriter.int8.scheme import QuantSpec
from rewriter.int8.simulate import Quantized
from rewriter.repair.useful_ranges import cut_to_useful, ties
from tests.rules import check

SHAPE = (3, 14, 12)


class Gated(nn.Module):
    """Squeeze and excite with logits far beyond what its gate can tell, and a head with wide logits."""

    def __init__(self, gate: nn.Module, act: nn.Module, end: nn.Module) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3), act
        self.squeeze, self.gate = nn.Conv2d(8, 8, 1), gate
        self.head, self.end = nn.Conv2d(8, 2, 1), end
        check.randomise(self)
        with torch.no_grad():
            self.stem.weight *= 2
            self.squeeze.weight *= 30
            self.head.weight *= 30

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.stem(x))
        y = y * self.gate(self.squeeze(y.mean((2, 3), keepdim=True)))
        return self.end(self.head(y))


def quantized(model: nn.Module, said: str = "values", name: str = "onnxruntime") -> Quantized:
    x = check.inputs(SHAPE, 16).float()
    gm = trace(model.eval(), x[:2])
    gm.meta["fidelity"] = measure_fidelity(gm, [x], declared(said))
    return quantize(gm, target(name), [x])


def cut(q: Quantized) -> dict[str, tuple[float, float]]:
    return cut_to_useful(q, [check.inputs(SHAPE, 16).float()]).calibration.values


@pytest.mark.parametrize(
    ("gate", "most"), [(nn.Sigmoid(), 9.3), (nn.Hardsigmoid(), 3.0), (nn.Tanh(), 5.0)]
)
def test_a_gate_is_cut_to_what_it_can_tell(gate: nn.Module, most: float) -> None:
    q = quantized(Gated(gate, nn.ReLU(), nn.Identity()))
    low, high = q.calibration.values["squeeze"]
    assert max(-low, high) > 1.5 * most
    new_low, new_high = cut(q)["squeeze"]
    assert -most <= new_low <= 0 <= new_high <= most
    # what is seen inside stays
    assert new_low == low or new_low < -0.9 * most
    assert new_high == high or new_high > 0.9 * most


def test_a_cut_changes_nothing_but_steps() -> None:
    """In float the cut values give the same scores; in int8 they come nearer."""
    q = quantized(Gated(nn.Sigmoid(), nn.ReLU(), nn.Sigmoid()))
    x = check.inputs(SHAPE, 16, seed=8).float()
    better = cut_to_useful(q, [check.inputs(SHAPE, 16).float()])
    errors = [float((simulate(some)(x) - q.gm(x)).square().mean()) for some in (q, better)]
    assert errors[1] < 0.7 * errors[0]


def test_hardswish_is_cut_on_the_left_alone() -> None:
    q = quantized(Gated(nn.Sigmoid(), nn.Hardswish(), nn.Identity()), name="tflite")
    node = next(n for n in q.gm.graph.nodes if n.name == "stem")
    if annotation(node).output is None:
        pytest.skip("fused on this target")
    low, high = q.calibration.values["stem"]
    assert low < -3
    assert cut(q)["stem"] == (-3.0, high)


def test_other_values_stay() -> None:
    q = quantized(Gated(nn.Sigmoid(), nn.ReLU(), nn.Identity()))
    before, after = q.calibration.values, cut(q)
    assert {n for n in before if before[n] != after[n]} == {"squeeze"}


def test_a_value_with_another_reader_stays() -> None:
    class Both(Gated):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.stem(x))
            z = self.squeeze(y)
            return self.head(y * self.gate(z)) + self.head(z)

    q = quantized(Both(nn.Sigmoid(), nn.ReLU(), nn.Identity()))
    assert cut(q)["squeeze"] == q.calibration.values["squeeze"]


def test_logits_at_an_output_are_cut_only_where_they_are_said_to_be() -> None:
    told = quantized(Gated(nn.Sigmoid(), nn.ReLU(), nn.Identity()), "sigmoid_logits")
    (end,) = (n.name for n in outputs(told.gm))
    low, high = told.calibration.values[end]
    assert max(-low, high) > 20
    new_low, new_high = cut(told)[end]
    assert -9.3 <= new_low <= 0 <= new_high <= 9.3


class Scores(nn.Module):
    """Scores of given logits: the identity in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            for layer in (self.conv, self.head):
                layer.weight.copy_(torch.eye(3).view(3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


@pytest.mark.parametrize(
    ("logits", "may"),
    [
        (
            lambda z: torch.where(z < -2.5, 300 * z, 2 * z),
            True,
        ),  # few are far below, all others near
        (lambda z: 12 + 3 * z, False),  # all is beyond the cut: the order is all there is
        (lambda z: -15 + 3 * z, False),
        (lambda z: torch.where(z > 2.5, 20 + 4 * z, z), False),  # the highest are beyond it
    ],
)
def test_an_order_is_never_given_away(logits: Callable[[Tensor], Tensor], may: bool) -> None:
    z = torch.randn(24, 3, 14, 12, generator=torch.Generator().manual_seed(0))
    x = logits(z)
    gm = trace(Scores().eval(), x[:2])
    gm.meta["fidelity"] = measure_fidelity(gm, [x], declared("sigmoid_logits"), "decoded")
    q = quantize(gm, target("onnxruntime"), [x])
    found = cut_to_useful(q, [x]).calibration.values["head"]
    ends = q.calibration.values["head"]
    assert (found != ends) is may
    scores = gm(x).detach().flatten()
    before, after = (ties(scores, e, QuantSpec()) for e in (ends, found))
    assert after[0] <= before[0]
    assert after[1] <= before[1]


def test_ties_are_pairs_of_one_level() -> None:
    scores = torch.tensor([0.0, 0.1, 1.0, 2.0, 3.0, 100.0])
    whole, highest = ties(scores, (0.0, 255.0), QuantSpec())
    assert whole == pytest.approx((2**2 + 4) / 36)
    assert highest == pytest.approx(0.5)
