from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter import profile, quantize, simulate, target, trace
from rewriter.graph.lookup import layers, module_of
from rewriter.int8.calibrate import input_scale
from rewriter.int8.simulate import Quantized
from rewriter.repair import bias_and_rounding as module
from rewriter.repair.bias_and_rounding import refine
from tests.rules import check

SHAPE = (3, 14, 12)
BOTH = frozenset({"biases", "rounding"})


class Net(nn.Module):
    """Depthwise layers whose channels differ by 100, a residual, a pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.dw, self.pw = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 8, 1)
        self.dw2 = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=8)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.pw(torch.relu(self.dw(torch.relu(self.stem(x))))))
        x = x + self.dw2(x)
        return self.head(x.mean((2, 3)))


def uneven() -> Net:
    model = check.randomise(Net())
    with torch.no_grad():
        for layer in (model.dw, model.dw2):
            layer.weight *= torch.logspace(-2, 0, 8).view(8, 1, 1, 1)
    return model


@pytest.fixture
def quantized() -> Quantized:
    x = check.inputs(SHAPE, 24).float()
    gm = trace(uneven(), x[:2])
    profile(gm, [x])
    return quantize(gm, target("per_tensor"), x.split(12))


def batches() -> tuple[Tensor, ...]:
    return check.inputs(SHAPE, 24).float().split(12)


def means(gm: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """Mean of each layer's output channels."""
    found: dict[str, Tensor] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.ndim >= 2:
                found[n.name] = value.mean([d for d in range(value.ndim) if d != 1])
            return value

    with torch.no_grad():
        Record(gm).run(x)
    return found


def test_after_bias_correction_every_layers_mean_is_the_float_one(quantized: Quantized) -> None:
    x = torch.cat(batches())
    exact = means(quantized.gm, x)
    repaired = means(simulate(refine(quantized, batches(), frozenset({"biases"}))), x)
    plain = means(simulate(quantized), x)
    worst = 0.0
    for node in layers(quantized.gm):
        scale = float(exact[node.name].abs().max())
        # not to the last digit: sums in another order tip a few values at a tie to the other side
        assert float((repaired[node.name] - exact[node.name]).abs().max()) < 5e-4 * scale
        worst = max(worst, float((plain[node.name] - exact[node.name]).abs().max()) / scale)
    assert worst > 0.005  # there was something to correct


@pytest.mark.parametrize(
    ("name", "left"),
    [("per_tensor", 0.75), ("onnxruntime", 0.9), ("tensorrt", 1.0), ("tflite", 0.9)],
)
def test_each_repair_lowers_the_error_on_other_inputs(name: str, left: float) -> None:
    other = check.inputs(SHAPE, 40, seed=77).float()
    gm = trace(uneven(), other[:2])

    def error(q: Quantized) -> float:
        with torch.no_grad():
            return float((simulate(q)(other) - gm(other)).square().mean())

    plain, biases, both = 0.0, 0.0, 0.0
    for seed in range(
        4
    ):  # one weight that tips to the other side is 10 % of so small a network's error
        x = check.inputs(SHAPE, 24, seed=seed).float()
        quantized = quantize(gm, target(name), [x])
        plain += error(quantized)
        biases += error(refine(quantized, [x], frozenset({"biases"})))
        both += error(refine(quantized, [x], BOTH))
    assert both < left * plain
    assert both < 1.05 * biases


def test_rounded_weights_lie_on_the_grid_that_the_calibration_keeps(quantized: Quantized) -> None:
    repaired = refine(quantized, batches(), BOTH)
    for node in layers(repaired.gm):
        scale = repaired.calibration.weights[node.name]
        steps = module_of(repaired.gm, node).weight.double() / scale.double()
        assert float((steps - steps.round()).abs().max()) < 1e-4
        assert float(steps.abs().max()) < 127.001
        assert scale.shape == quantized.calibration.weights[node.name].shape


def test_the_source_is_not_touched(quantized: Quantized) -> None:
    state = {k: v.clone() for k, v in quantized.gm.state_dict().items()}
    scales = {k: v.clone() for k, v in quantized.calibration.weights.items()}
    code = quantized.gm.code
    repaired = refine(quantized, batches(), BOTH)
    assert quantized.gm.code == code == repaired.gm.code
    for k, v in quantized.gm.state_dict().items():
        assert torch.equal(v, state[k])
    for k, v in quantized.calibration.weights.items():
        assert torch.equal(v, scales[k])
    assert repaired.calibration.values == quantized.calibration.values


def test_a_layer_kept_in_float_is_left_alone(quantized: Quantized) -> None:
    x = torch.cat(batches())
    gm = quantized.gm
    layers(gm)[1].meta["keep_float"] = True
    repaired = refine(quantize(gm, target("per_tensor"), [x]), batches(), BOTH)
    kept = layers(gm)[1].name
    before, after = (
        module_of(g, n) for g in (gm, repaired.gm) for n in layers(g) if n.name == kept
    )
    assert torch.equal(before.weight, after.weight)
    assert after.bias is None


def test_little_memory_means_fewer_inputs(
    quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module._affordable(quantized.gm, batches())
    assert sum(len(x[0]) for x in whole) == 24
    peak = 8 * 3 * 8 * 14 * 12  # two networks, four bytes, three values of 8 channels
    monkeypatch.setattr(module, "MEMORY", 5 * peak)
    few = sum(len(x[0]) for x in module._affordable(quantized.gm, batches()))
    assert 3 <= few <= 12
    refine(quantized, batches(), BOTH)


def test_a_dead_layer_and_constant_inputs_do_not_break_it() -> None:
    model = uneven()
    with torch.no_grad():
        model.pw.weight.zero_()
        model.dw.weight[2].zero_()
    x = torch.cat(batches())
    gm = trace(model, x[:2])
    repaired = refine(quantize(gm, target("onnxruntime"), [x]), [x], BOTH)
    assert bool(torch.isfinite(simulate(repaired)(x)).all())


@pytest.mark.parametrize("repairs", [frozenset({"biases"}), BOTH])
def test_what_a_range_cuts_off_on_purpose_is_not_made_good(repairs: frozenset[str]) -> None:
    """One outlier that the range leaves out: the repairs are those of the inputs without it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    x = torch.rand(24, 3, 6, 6)
    gm = trace(model, x[:2])
    plain = quantize(gm, target("onnxruntime"), [x])
    wild = x.clone()
    wild[:, :, 0, 0] = 40.0
    clipped = refine(plain, [wild], repairs)  # the ranges are those of x
    usual = refine(plain, [torch.where(wild > 1, x.amax(), wild)], repairs)
    for before, after in zip(layers(usual.gm), layers(clipped.gm), strict=True):
        expected, found = (
            module_of(g, n).bias for g, n in ((usual.gm, before), (clipped.gm, after))
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["per_tensor", "onnxruntime"])
def test_rounded_weights_leave_room_for_the_int32_bias(name: str) -> None:
    """Weights a thousand million times smaller than the bias: their own best step would overflow it."""
    model = uneven()
    with torch.no_grad():
        model.pw.weight *= 1e-8
        assert model.pw.bias is not None
        model.pw.bias.copy_(torch.linspace(3.0, 9.0, 8))
    x = check.inputs(SHAPE, 24).float()
    gm = trace(model, x[:2])
    profile(gm, [x])
    found = refine(quantize(gm, target(name), x.split(12)), batches(), frozenset({"rounding"}))
    node = next(n for n in layers(found.gm) if n.name == "pw")
    step = input_scale(found.gm, node, found.calibration.values)
    assert step is not None
    bias = module_of(found.gm, node).bias.detach().double().abs()
    whole = bias / (step * found.calibration.weights["pw"].double())
    assert float(whole.max()) <= 2.0**30 * 1.01
