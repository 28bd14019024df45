"""Each cause is planted alone in a healthy network, and the analysis must name that one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rewriter.sensitivity import THRESHOLDS, LayerDamage
from tests.sensitivity.planted import Healthy, analyzed, healthy, inputs


def entry(model: nn.Module, layer: str, name: str = "per_tensor", **options: Any) -> LayerDamage:
    found = analyzed(model, name, **options)
    return next(x for x in found.layers if x.layer == layer)


def weight_channel_spread(m: Healthy) -> None:
    m.dw.weight.data[3] *= 40
    m.dw.bias.data[3] *= 40
    m.pw.weight.data[:, 3] /= 40


def weight_outliers(m: Healthy) -> None:
    m.mix.weight.data[5, 7, 1, 2] *= 40


def activation_channel_spread(m: Healthy) -> None:
    m.pw.weight.data[4] *= 30
    m.pw.bias.data[4] *= 30
    m.mix.weight.data[:, 4] /= 30


def shared_range(m: Healthy) -> None:
    for p in (m.left.weight, m.left.bias):
        p.data *= 40
    m.join.weight.data[:, :12] /= 40


def dead_channels(m: Healthy) -> None:
    m.stem.weight.data[2] = 0
    m.stem.bias.data[2] = -1.0  # never passes the ReLU
    m.dw.weight.data[2] *= 60  # as batch norm leaves it where the variance is nothing


def dead_activations(m: Healthy) -> None:
    m.pw.weight.data[6] = 0
    m.pw.bias.data[6] = 90.0
    m.mix.weight.data[:, 6] = 0


def bias_overflow(m: Healthy) -> None:
    m.left.weight.data[3] = 1e-9
    m.left.bias.data[3] = 3.0


PLANTED: dict[str, tuple[Callable[[Healthy], None], str, str]] = {
    "weight_channel_spread": (weight_channel_spread, "dw", "per_tensor"),
    "weight_outliers": (weight_outliers, "mix", "per_tensor"),
    "activation_channel_spread": (activation_channel_spread, "mix", "onnxruntime"),
    "shared_range": (shared_range, "join", "onnxruntime"),
    "dead_channels": (dead_channels, "dw", "per_tensor"),
    "dead_channels (activation)": (dead_activations, "mix", "onnxruntime"),
    "bias_overflow": (bias_overflow, "left", "onnxruntime"),
}


@pytest.mark.parametrize("cause", PLANTED)
def test_the_planted_cause_is_named_and_no_other(cause: str) -> None:
    plant, layer, name = PLANTED[cause]
    model = healthy()
    assert cause.split()[0] not in entry(model, layer, name, top=9).causes
    plant(model)
    found = entry(model, layer, name, top=9)
    assert found.causes == (cause.split()[0],), found.evidence
    (evidence,) = found.evidence
    assert evidence.number >= evidence.threshold == THRESHOLDS[evidence.name]


def test_a_healthy_network_has_no_causes() -> None:
    for name in ("per_tensor", "onnxruntime"):
        for x in analyzed(healthy(), name, top=9).layers:
            assert not x.causes, x.evidence


def test_outliers_of_the_input() -> None:
    model = healthy()
    calibration = inputs(16, 2)
    calibration[3, :, 5, 5] = 40.0
    from rewriter.int8.scheme import target
    from rewriter.sensitivity import analyze
    from rewriter.tracing.trace import trace

    found = analyze(
        trace(model, calibration[:2]), target("onnxruntime"), [calibration], inputs(), top=9
    )
    (stem,) = [x for x in found.layers if x.layer == "stem"]
    assert stem.causes == ("activation_outliers",)
    assert stem.evidence[0].about == "x"


def test_inputs_beyond_the_calibrated_range() -> None:
    found = entry(healthy(), "stem", "onnxruntime", x=1.5 * inputs(), top=9)
    assert found.causes == ("saturating_input",)
    assert found.evidence[0].number == pytest.approx(1 / 3, abs=0.03)


def test_a_head_whose_channels_differ_names_the_shared_range() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = healthy().stem
            self.head = nn.Conv2d(16, 12, 1)
            self.head.weight.data[:3] *= 100

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x).relu()).reshape(x.shape[0], 12, -1)

    torch.manual_seed(2)
    found = entry(Head().eval(), "head", "onnxruntime")
    assert found.causes == ("shared_range",)
    assert found.evidence[0].about == "reshape"
    assert any(a.startswith("split_head") for a in found.answers)


@pytest.mark.parametrize("name", ["per_tensor", "onnxruntime"])
def test_a_planted_channel_ranks_first(name: str) -> None:
    """One channel of a depthwise convolution scaled by 1000, undone in the next layer."""
    model, broken = healthy(), healthy()
    before = {x.layer: x.damage for x in analyzed(model, name).layers}
    broken.dw.weight.data[5] *= 1000
    broken.dw.bias.data[5] *= 1000
    broken.pw.weight.data[:, 5] /= 1000
    x = inputs(8)
    torch.testing.assert_close(broken(x), model(x), rtol=1e-3, atol=1e-4)
    found = analyzed(broken, name)
    # per tensor the weight itself is lost too; with a scale for each channel only its result is
    harmed = ["dw", "pw"] if name == "per_tensor" else ["pw"]
    first, rest = found.layers[: len(harmed)], found.layers[len(harmed) :]
    assert sorted(x.layer for x in first) == harmed
    for x in first:
        assert x.damage > 20 * before[x.layer]
        assert x.damage > 5 * rest[0].damage
    assert [x.damage for x in found.layers] == sorted(
        (x.damage for x in found.layers), reverse=True
    )
    if name == "onnxruntime":
        value = found.values[0]
        assert (value.value, value.layer, value.feeds) == ("act_1", "dw", ("pw",))
        assert value.channels == (5,)


def test_a_planted_depthwise_weight_ranks_first_alone() -> None:
    """The same channel, undone in the layer before: only the depthwise weights hold the spread."""
    broken = healthy()
    broken.dw.weight.data[5] *= 1000
    broken.stem.weight.data[5] /= 1000
    broken.stem.bias.data[5] /= 1000
    found = analyzed(broken)
    assert found.layers[0].layer == "dw"
    assert found.layers[0].damage > 5 * found.layers[1].damage
    assert "weight_channel_spread" in found.layers[0].causes


def test_answers_touch_the_layer_and_free_ones_come_first() -> None:
    for x in analyzed(healthy(), top=9).layers:
        assert f"keep_float@{x.node}" == x.answers[-1]
        assert len(x.answers) == len(x.answer_macs) == len(set(x.answers))
        assert list(x.answer_macs[:-1]) == sorted(x.answer_macs[:-1])
    dw = entry(healthy(), "dw", top=9)
    merged = dict(zip(dw.answers, dw.answer_macs, strict=True))["merge_separable@dw"]
    places = 7 * 6
    assert merged == places * (16 * 24 * 9 - 16 * 9 - 16 * 24)


class Swish(nn.Module):
    """A convolution far below -3 before a hardswish, where nothing that follows can tell."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last = nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.first.weight *= 3
            self.first.bias[:4] -= shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)))


@pytest.mark.parametrize(("shift", "named"), [(60.0, True), (0.0, False)])
def test_levels_that_a_hardswish_cannot_tell_apart(shift: float, named: bool) -> None:
    found = [
        entry(Swish(shift).eval(), layer, "onnxruntime", top=9) for layer in ("first", "last")
    ]
    assert any("idle_range" in f.causes for f in found) == named, [f.evidence for f in found]
    if named:
        (cause,) = [e for f in found for e in f.evidence if e.name == "idle_range"][:1]
        assert cause.about == "first"
        assert cause.number < 0.3
        assert any("refine_ranges@model" in f.answers for f in found if f.causes)
