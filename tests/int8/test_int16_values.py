"""Values of 16 bits: the simulation against numpy, the file against the simulation, and the bias."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn

from rewriter import Plan, find_sites, profile, rewrite, target, trace
from rewriter.graph.lookup import module_of
from rewriter.int8.annotate import annotate, annotation
from rewriter.int8.integer_grid import fake_quantize
from rewriter.int8.onnx.compare import compare, first_departure
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.lint import lint
from rewriter.int8.onnx.session import Session
from rewriter.int8.scheme import QuantSpec
from rewriter.int8.simulate import FakeQuantize, Quantized, quantize, simulate
from tests.int8 import oracle
from tests.networks import SIZE, network

SHAPE = (3, 12, 9)


class Uneven(nn.Module):
    """One channel of the first value is hundreds of times as large as the others, and undone by the next layer."""

    def __init__(self, act: nn.Module, spread: float = 300.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.act = nn.Conv2d(3, 8, 3, 2, 1), act
        self.dw, self.pw = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)
        with torch.no_grad():
            self.stem.weight[3] *= spread
            self.stem.bias[3] *= spread
            self.dw.weight[3] /= spread

    def forward(self, x: Tensor) -> Tensor:
        x = self.dw(self.act(self.stem(x)))
        x = x + self.pw(x).relu()
        return self.fc(x.mean((2, 3)))


def made(
    plan: str, act: nn.Module | None = None, on: str = "qnn"
) -> tuple[fx.GraphModule, Quantized, Tensor]:
    x = torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(1))
    gm = trace(Uneven(act or nn.ReLU()).eval(), x[:2])
    profile(gm, [x])
    new = rewrite(gm, Plan.parse(plan), facts={"scheme": target(on)})
    return gm, quantize(new, target(on), [x]), x


def ran(gm: fx.GraphModule, x: Tensor) -> Tensor:
    with torch.no_grad():
        return gm(x)


def damage(plan: str, act: nn.Module | None = None) -> float:
    """Squared error of the int8 answers relative to the float answers' variance over images."""
    gm, q, x = made(plan, act)
    expected = ran(gm, x).double()
    error = (ran(simulate(q, kernels=True), x).double() - expected).square().mean()
    return float(error / expected.var(0).mean())


# -------------------------------------------------------------------------------- arithmetic


def uint16(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """``x`` on the 65536 levels of a range that holds zero, for which no zero point need be looked for."""
    assert low == 0
    return oracle.rounded(x, np.float32(high / 65535), 0, 0, 65535)


def by_hand(q: Quantized, x: Tensor, levels: Any = uint16) -> np.ndarray:
    """The depthwise layer's value before it is rounded, from the definition, in numpy."""
    ranges = q.calibration.values

    def array(t: Tensor) -> np.ndarray:
        return t.detach().double().numpy()

    def layer(name: str, value: np.ndarray, step: np.float32, *rest: int) -> np.ndarray:
        m: Any = q.gm.get_submodule(name)
        w = array(m.weight)
        scales = np.float32(np.abs(w).max((1, 2, 3)) / 127).astype(float) * step
        bias = np.rint(array(m.bias) / scales) * scales
        return oracle.convolve(value, oracle.weight(w, 0), bias, *rest)

    low, high = ranges["x"]
    step, _ = oracle.affine(low, high, 0, 255)
    first = layer("stem", oracle.uint8(x.numpy(), low, high), np.float32(step), 2, 1)
    low, high = ranges["act"]
    value = levels(np.maximum(first, 0), low, high)
    return layer("dw", value, np.float32(high / 65535), 1, 1, 8)


def simulated(q: Quantized, x: Tensor, kernels: bool) -> np.ndarray:
    """The depthwise layer's value in the simulation; its own rounding is switched off to 16 bits."""
    sim = simulate(q, kernels=False) if not kernels else simulate(q, kernels=True)
    found: list[Any] = []
    node = next(n for n in sim.graph.nodes if n.name == "dw")
    sim.get_submodule(str(node.target)).register_forward_hook(
        lambda module, args, output: found.append(output)
    )
    ran(sim, x)
    return found[0].double().numpy()


def test_the_simulation_rounds_to_65536_levels() -> None:
    _, q, x = made("keep_int16@stem")
    expected, step = by_hand(q, x), q.value_params(_node(q, "dw"))[0]
    assert np.abs(simulated(q, x, kernels=False) - expected).max() < 1e-4 * step
    kernel = simulated(q, x, kernels=True)  # which writes int8 at once
    assert np.abs(kernel - expected).max() <= 0.5001 * step
    assert np.abs(kernel / step - np.rint(kernel / step)).max() < 1e-3


@pytest.mark.parametrize("fault", ["8 bits", "15 bits", "the input's scale"])
def test_the_oracle_tells_a_fault(fault: str) -> None:
    _, q, x = made("keep_int16@stem")
    step = q.value_params(_node(q, "dw"))[0]
    wrong = {
        "8 bits": lambda v, low, high: oracle.rounded(v, np.float32(high / 255), 0, 0, 255),
        "15 bits": lambda v, low, high: oracle.rounded(v, np.float32(high / 32767), 0, 0, 32767),
        "the input's scale": lambda v, low, high: oracle.rounded(v, 1e-3, 0, 0, 65535),
    }[fault]
    off = np.abs(simulated(q, x, kernels=False) - by_hand(q, x, wrong)).max()
    assert off > 1e-3 * step


def test_sums_of_a_wide_input_are_exact() -> None:
    """Whole numbers beyond 2^24, which float32 would round: the kernel counts in float64."""
    layer = nn.Conv2d(64, 1, 3, bias=False).eval()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[0, 0, 0, 0] = 1 / 127
    gm = trace(nn.Sequential(nn.Conv2d(1, 64, 1), nn.ReLU(), layer).eval(), torch.rand(1, 1, 3, 3))
    x = torch.rand(4, 1, 3, 3)
    gm = rewrite(gm, Plan.parse("keep_int16@_0"), facts={"scheme": target("qnn")})
    q = quantize(gm, target("qnn"), [x])
    sim = simulate(q, kernels=True)
    node = next(n for n in sim.graph.nodes if n.name == "_2")
    kernel: Any = sim.get_submodule(str(node.target))
    value = torch.full((1, 64, 3, 3), kernel.read.scale * 65535)
    value[0, 0, 0, 0] = kernel.read.scale * 65534
    whole = 127 * 65535 * (64 * 9 - 1) + 65534
    assert whole > 2**24
    assert whole != float(np.float32(whole))
    kernel.writes = kernel.read.scale * float(kernel.scale)  # nothing is lost after the sum
    assert abs(float(kernel(value.double())) / kernel.writes - whole) < 0.5


def test_the_gradient_passes_a_wide_value_inside_its_range_alone() -> None:
    x = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    spec = QuantSpec(bits=16)
    y = fake_quantize(x, *spec.params(0.0, 1.0), spec)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 0]
    assert y.tolist() == pytest.approx([0, 0.5, 1], abs=1e-5)


# ---------------------------------------------------------------------------- what it is good for


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.LeakyReLU()])
def test_16_bits_at_the_named_value_bring_the_answers_back(act: nn.Module) -> None:
    plain, repaired = damage("", act), damage("keep_int16@stem", act)
    assert plain > 0.05
    assert repaired < 0.05 * plain
    assert damage("keep_int16@pw", act) > 0.5 * plain  # elsewhere they do not


def test_without_16_bits_the_target_is_as_onnxruntime() -> None:
    _, q, _ = made("")
    _, other, _ = made("", on="onnxruntime")
    for a, b in zip(q.gm.graph.nodes, other.gm.graph.nodes, strict=True):
        one, two = annotation(a), annotation(b)
        assert (one.output, one.reads, one.range_of) == (two.output, two.reads, two.range_of)
        # but for the least scale of a channel, which no channel of this network falls below
        assert (one.weight is None) == (two.weight is None)
    assert to_onnx(q) == to_onnx(other)


# -------------------------------------------------------------------------------------- the file


def _node(q: Quantized, name: str) -> fx.Node:
    return next(n for n in q.gm.graph.nodes if n.name == name)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU()])
@pytest.mark.parametrize(
    "plan", ["keep_int16@stem", "keep_int16@dw", "keep_int16@pw keep_int16@fc"]
)
def test_the_file_agrees_with_the_simulation(act: nn.Module, plan: str) -> None:
    _, q, x = made(plan, act)
    model = to_onnx(q)
    onnx.checker.check_model(model, full_check=True)
    for optimize in (False, True):
        assert first_departure(compare(q, x, optimize=optimize, threads=1), q) is None
    found = Session(model, threads=1).run(x)[0]
    expected = ran(simulate(q, kernels=True), x)
    step = q.value_params(_node(q, "fc"))[0]
    assert np.abs(found - expected.numpy()).max() < (1.5 if "fc" not in plan else 300) * step


@pytest.mark.parametrize("seed", range(6))
def test_the_file_of_a_random_network_agrees(seed: int) -> None:
    """Half of the layers in 16 bits: sums, gates, concatenations, moves and heads of both widths."""
    x = torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(seed))
    gm = trace(network(seed), x[:2])
    gm.meta["scheme"] = target("qnn")
    profile(gm, [x])
    sites = [s for s in find_sites(gm) if s.rule == "keep_int16" and not s.blocked]
    chosen = [f"keep_int16@{s.anchor}" for s in sites[seed % 2 :: 2]]
    q = quantize(rewrite(gm, Plan.parse(" ".join(chosen))), target("qnn"), [x])
    specs = [annotation(n).output for n in q.gm.graph.nodes]
    assert sum(s is not None and s.bits == 16 for s in specs) >= len(chosen) > 0
    onnx.checker.check_model(to_onnx(q), full_check=True)
    assert first_departure(compare(q, x, optimize=False, threads=1), q) is None


@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.Tanh()])
def test_a_sigmoid_of_a_wide_value_has_the_scale_that_qnn_asks_for(act: nn.Module) -> None:
    _, q, x = made("keep_int16@stem", act)
    model = to_onnx(q)
    wide = next(n for n in model.graph.node if n.name == "act.down.q")
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    expected = (1 / 65536, 0) if isinstance(act, nn.Sigmoid) else (1 / 32768, 32768)
    assert (float(found[wide.input[1]]), int(found[wide.input[2]])) == expected
    rows = {r.node: r for r in compare(q, x, threads=1)}
    # which is not a whole number of the steps of 8 bits: some values are rounded another way
    assert rows["act"].largest < 1.001
    assert rows["act"].differs < 0.02


@pytest.mark.parametrize(("fault", "where"), [("8 bits", "act"), ("weight scale", "dw")])
def test_a_departure_of_a_wide_value_is_seen(
    fault: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wider bounds hide nothing: not a file that forgets the 16 bits, nor a scale that is a thousandth off."""
    _, q, x = made("keep_int16@stem")
    weights = {**q.calibration.weights, "stem": q.calibration.weights["stem"] * 1.001}
    wrong = replace(q, calibration=replace(q.calibration, weights=weights))
    written = made("")[1] if fault == "8 bits" else wrong
    module = sys.modules["rewriter.int8.onnx.compare"]
    monkeypatch.setattr(module, "to_onnx", lambda _, names: to_onnx(written, names))
    found = first_departure(compare(q, x, threads=1), q)
    assert found is not None
    assert found.node == where


def test_all_that_an_operation_reads_and_writes_is_of_one_width() -> None:
    """As QNN wants it; the conversions on the way change no number."""
    for act in (nn.ReLU(), nn.SiLU()):
        for plan in ("keep_int16@stem", "keep_int16@dw", "keep_int16@pw", "keep_int16@fc"):
            _, q, _ = made(plan, act)
            model = to_onnx(q)
            types = {t.name: t.data_type for t in model.graph.initializer}
            makers = {o: n for n in model.graph.node for o in n.output}
            width: dict[str, int] = {}
            for n in model.graph.node:
                if n.op_type in ("QuantizeLinear", "DequantizeLinear"):
                    wide = types[n.input[2]] == onnx.TensorProto.UINT16 if len(n.input) > 2 else 0
                    assert (n.domain == "com.microsoft") == bool(wide)
                    width[n.output[0]] = 16 if wide else 8
            for n in model.graph.node:
                if n.op_type not in ("Conv", "Gemm", "Add", "GlobalAveragePool", "Relu"):
                    continue
                read = [
                    width[i]
                    for i in n.input
                    if i in width and makers[i].input[0] not in types  # no weight
                ]
                written = [
                    width[q.output[0]]
                    for q in model.graph.node
                    if q.op_type == "QuantizeLinear" and q.input[0] == n.output[0]
                ]
                assert len({*read, *written}) <= 1, (plan, n.name, read, written)
            assert 16 in width.values()


def test_conversions_are_exact() -> None:
    for low, high in ((-1.3, 2.9), (0.0, 7.1), (-4.0, 0.0)):
        scale, zero = QuantSpec().params(low, high)
        x = np.linspace(1.1 * low - 0.1, 1.1 * high + 0.1, 5001, dtype=np.float32)
        once = oracle.quantized(x, scale, zero, 0, 255)
        wide = oracle.rounded(x, np.float32(scale / 257), zero * 257, 0, 65535)
        assert (oracle.quantized(wide, scale, zero, 0, 255) == once).all()
        back = ((once - zero) * np.float32(scale)).astype(np.float32)
        up = oracle.quantized(back, np.float32(scale / 257), zero * 257, 0, 65535)
        assert (up == once * 257).all()


# -------------------------------------------------------------------------------------- the bias


def test_a_bias_that_overflows_behind_16_bits_fits() -> None:
    """Steps of the bias are 257 times as fine: what 8 bits can hold 16 may not."""
    found: dict[str, Quantized] = {}
    for plan in ("", "keep_int16@stem"):
        gm, _, x = made("")
        with torch.no_grad():
            gm.get_submodule("dw").weight[2] *= 1e-6
            gm.get_submodule("dw").bias[2] = 2.0
        gm = rewrite(gm, Plan.parse(plan), facts={"scheme": target("qnn")})
        found[plan] = quantize(gm, target("qnn"), [x])
    for q in found.values():
        model = to_onnx(q)
        bias = next(t for t in model.graph.initializer if t.name == "dw.bias")
        assert np.abs(numpy_helper.to_array(bias).astype(float)).max() <= 2**30 * 1.001
        codes = Counter((f.code, f.node) for f in lint(q, model))
        assert codes["bias_overflow", "dw"] == 0  # the weights behind it are never seen
    ratio = (
        found["keep_int16@stem"].calibration.weights["dw"] / found[""].calibration.weights["dw"]
    )
    assert float(ratio[2]) > 1
    assert (ratio[[0, 1, 3]] == 1).all()


def test_lint_says_that_the_cpu_has_no_16_bit_kernels() -> None:
    _, q, _ = made("keep_int16@stem")
    said = {f.node: f.message for f in lint(q, to_onnx(q)) if f.code == "float_layer"}
    assert "16 bits" in said["dw"]
    assert "pw" not in said


def test_a_wide_value_that_is_moved_stays_wide() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 24, 2))
    gm = trace(net.eval(), torch.randn(1, *SHAPE))
    gm = rewrite(gm, Plan.parse("keep_int16@_0"), facts={"scheme": target("qnn")})
    annotate(gm, target("qnn"))
    outputs = {n.name: annotation(n).output for n in gm.graph.nodes}
    assert [outputs[n].bits for n in ("_0", "_1", "_2", "_3")] == [16, 16, 16, 8]
    x = torch.randn(8, *SHAPE)
    q = quantize(gm, target("qnn"), [x])
    read: Any = module_of(simulate(q), next(n for n in simulate(q).graph.nodes if n.name == "_3"))
    assert isinstance(read.read, FakeQuantize)
    assert read.read.spec.bits == 16
    assert first_departure(compare(q, x, threads=1), q) is None
