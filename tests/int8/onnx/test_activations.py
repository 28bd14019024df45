"""Activations and gates on ONNX Runtime's int8 kernels: nothing runs in float, and the numbers are those of the simulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter import quantize, trace
from rewriter.graph.lookup import find
from rewriter.int8 import isolated
from rewriter.int8.annotate import annotation
from rewriter.int8.onnx.activations import LEAST_PLACES
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.readback import opened
from rewriter.int8.onnx.session import Session
from rewriter.int8.scheme import target
from rewriter.int8.simulate import GatedActivation, Quantized, simulate

TIES = 0.003  # share of the values where a last bit decides between two steps
SIDE = 24  # with more places than LEAST_PLACES


class Excite(nn.Module):
    """Squeeze and excite behind an activation."""

    def __init__(self, act: nn.Module, gate: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, channels, 3, padding=1), act
        self.pool, self.fc, self.gate = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels, 1),
            gate,
        )
        self.last = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.last(x * self.gate(self.fc(self.pool(x))))


def made(model: nn.Module, scheme: str = "onnxruntime", gain: float = 2.0) -> Quantized:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.uniform_(p, -gain, gain)
    x = torch.randn(8, 3, SIDE, SIDE)
    return quantize(trace(model.eval(), x[:2]), target(scheme), [x])


def named(quantized: Quantized, kind: type[nn.Module]) -> fx.Node:
    gm = quantized.gm
    return next(
        n
        for n in gm.graph.nodes
        if n.op == "call_module" and type(gm.get_submodule(str(n.target))) is kind
    )


@pytest.mark.parametrize("scheme", ["onnxruntime", "per_tensor"])
@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid])
@pytest.mark.parametrize("act", [nn.SiLU, nn.Hardswish, nn.ReLU, nn.LeakyReLU])
def test_nothing_between_the_quantizers_runs_in_float(
    act: type[nn.Module], gate: type[nn.Module], scheme: str
) -> None:
    quantized = made(Excite(act(), gate()), scheme)
    _, found = opened(quantized, to_onnx(quantized), threads=1)
    assert found.float_ops == {"QuantizeLinear": 1} or found.float_ops == {}, found.float_ops
    assert found.int8_share == 1


@pytest.mark.parametrize("gain", [0.05, 0.3, 2.0, 8.0])
@pytest.mark.parametrize("act", [nn.SiLU, nn.Hardswish, nn.Hardsigmoid])
def test_the_kernels_compute_what_the_simulation_does(act: type[nn.Module], gain: float) -> None:
    quantized = made(Excite(act(), nn.Hardsigmoid()), gain=gain)
    x, gm = torch.randn(4, 3, SIDE, SIDE), quantized.gm
    sim = simulate(quantized, kernels=True)
    with torch.no_grad():
        expected = sim(x)
    found = torch.from_numpy(Session(to_onnx(quantized), threads=1).run(x)[0])
    (last,) = gm.graph.find_nodes(op="output")[0].all_input_nodes
    step = quantized.value_params(last)[0]
    assert float(((expected - found).abs() > 0.5 * step).float().mean()) < 0.02
    node = named(quantized, act)
    values = Session(to_onnx(quantized, [node.name]), threads=1).run(x)[-1:]
    rows = isolated(quantized, x, {node.name: torch.from_numpy(values[0])}, fixed_point=False)
    assert rows[0].differs < TIES
    assert rows[0].largest < 1.5


@pytest.mark.parametrize("act", [nn.SiLU, nn.Hardswish])
def test_rounding_the_gate_costs_less_than_rounding_the_product(act: type[nn.Module]) -> None:
    """The gate's rounding adds at most as much noise as the output's own, for wide and for narrow inputs."""
    for reach in (0.5, 2.0, 6.0, 20.0):
        x = torch.linspace(-reach, reach, 4001)
        model = nn.Sequential(nn.Conv2d(1, 1, 1), act(), nn.Conv2d(1, 1, 1))
        for layer in (model[0], model[2]):
            layer.weight.data.fill_(1.0)  # type: ignore[union-attr]
            layer.bias.data.zero_()  # type: ignore[union-attr]
        batch = x.view(1, 1, 1, -1)
        quantized = quantize(trace(model.eval(), batch), target("onnxruntime"), [batch])
        node = named(quantized, act)
        (source,) = node.all_input_nodes
        scale, zero = quantized.value_params(source)
        seen = (torch.round(x / scale).clamp(-zero, 255 - zero)) * scale
        exact = act()(seen)
        gate = GatedActivation(
            nn.Sigmoid() if act is nn.SiLU else nn.Hardsigmoid(),
            quantized.gate_params(node),
            target("onnxruntime").activations,
        )
        noise = (gate(seen) - exact).square().mean()
        step = quantized.value_params(node)[0]
        assert float(noise) < 1.1 * step**2 / 12, reach


def test_a_hard_sigmoid_that_saturation_does_not_clip_stays_one() -> None:
    """Joined with a wider value its range is not [0, 1], and a sum alone would pass what lies outside."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.gate, self.last = nn.Hardsigmoid(), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.gate(self.a(x)) + self.b(x))

    quantized = made(Joined(), gain=6.0)
    node = find(quantized.gm, named(quantized, nn.Hardsigmoid).name)
    low, high = quantized.calibration.values[annotation(node).range_of]
    assert (low, high) == (0.0, 1.0)
    assert "HardSigmoid" not in {n.op_type for n in to_onnx(quantized).graph.node}
    quantized.calibration.values[annotation(node).range_of] = (low, 2.0)
    assert "HardSigmoid" in {n.op_type for n in to_onnx(quantized).graph.node}


def test_a_gate_is_repeated_over_the_width_from_so_many_places_on() -> None:
    for side, expected in ((22, False), (23, True)):
        assert (side * side >= LEAST_PLACES) is expected
        model = Excite(nn.ReLU(), nn.Sigmoid()).eval()
        x = torch.randn(2, 3, side, side)
        quantized = quantize(trace(model, x), target("onnxruntime"), [x])
        kinds = {n.op_type for n in to_onnx(quantized).graph.node}
        assert ("Expand" in kinds) is expected


@pytest.mark.parametrize("scheme", ["openvino", "tensorrt"])
def test_other_runtimes_get_the_float_island_that_they_fuse_themselves(scheme: str) -> None:
    quantized = made(Excite(nn.Hardswish(), nn.Hardsigmoid()), scheme)
    assert not any(annotation(n).inner for n in quantized.gm.graph.nodes)
    kinds = [n.op_type for n in to_onnx(quantized).graph.node]
    assert kinds.count("HardSigmoid") == 2


def test_nothing_is_written_that_nobody_reads() -> None:
    file = to_onnx(made(Excite(nn.Hardswish(), nn.Hardsigmoid())))
    read = {name for n in file.graph.node for name in n.input} | {
        o.name for o in file.graph.output
    }
    assert all(read.intersection(n.output) for n in file.graph.node)
