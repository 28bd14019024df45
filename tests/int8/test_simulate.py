from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from rewriter.graph.lookup import find, layers, module_of, outputs, unflatten
from rewriter.int8.annotate import annotation
from rewriter.int8.calibrate import Method
from rewriter.int8.scheme import QuantSpec, target
from rewriter.int8.simulate import FakeQuantize, QuantizedLayer, quantize, simulate, switches
from rewriter.tracing.trace import trace
from tests.int8 import oracle
from tests.networks import SIZE, network, randomise, relative_error

TARGETS = ["onnxruntime", "per_tensor", "tensorrt", "tflite"]


class Small(nn.Module):
    """Convolution, depthwise and pointwise with ReLU6, a skip, and a linear layer on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.dw = nn.Conv2d(4, 4, 3, 1, 1, groups=4)
        self.pw = nn.Conv2d(4, 4, 1, bias=False)
        self.act, self.fc = nn.ReLU6(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.act(self.stem(x))
        x = x + self.pw(self.act(self.dw(x)))
        return x, self.fc(x.mean((2, 3)))


def spread_out(model: Small) -> Small:
    """Weights of very different size in each channel, so that the axis of a scale matters."""
    randomise(model)
    with torch.no_grad():
        for name in ("stem", "dw", "pw"):
            weight = getattr(model, name).weight
            weight.mul_(torch.tensor([1.0, 0.05, 0.4, 2.0]).view(-1, 1, 1, 1))
        model.stem.weight.mul_(4.0)
        assert model.stem.bias is not None
        model.stem.bias.add_(2.0)
    return model


def reference(gm: fx.GraphModule, q, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The int8 network of ``Small`` by numpy, from the calibrated ranges alone."""
    name = q.scheme.name
    signed = name in ("tensorrt", "tflite")
    per_channel = name != "per_tensor"

    def grid(value: str) -> tuple[float, int, int, int]:
        low, high = q.calibration.values[annotation(find(gm, value)).range_of]
        if name == "tensorrt":
            return float(np.float32(max(-low, high, 0) / 127)), 0, -127, 127
        qmin = -128 if signed else 0
        scale, zero = oracle.affine(low, high, qmin, qmin + 255)
        return float(np.float32(scale)), zero, qmin, qmin + 255

    def value(x: np.ndarray, node: str) -> np.ndarray:
        return oracle.rounded(x, *grid(node))

    def layer(node: str, x: np.ndarray, read: str, axis: int | None, **settings) -> np.ndarray:
        m = module_of(gm, find(gm, node))
        w, b = m.weight.numpy(), None if m.bias is None else m.bias.double().numpy()
        if b is not None:
            rest = tuple(range(1, w.ndim))
            largest = np.abs(w).max() if axis is None else np.abs(w).max(rest)
            step = np.float32(largest / 127) * np.float64(grid(read)[0])
            b = np.rint(b / step) * step
        w = oracle.weight(w, axis)
        x = value(x, read)
        return x @ w.T + b if w.ndim == 2 else oracle.convolve(x, w, b, **settings)

    axis = 0 if per_channel else None
    first = np.clip(layer("stem", x, "x", axis, stride=2, padding=1), 0, 6)
    inner = np.clip(layer("dw", first, "act", axis, stride=1, padding=1, groups=4), 0, 6)
    inner = layer("pw", inner, "act_1", axis, stride=1, padding=0)
    total = value(first, "act") + value(inner, "pw")
    total = value(total, "add")
    mean = total.mean((2, 3))
    y = layer("fc", mean, "mean", 0 if name == "tensorrt" else None)
    return total, value(y, "fc")


def case(name: str, method: Method = "minmax"):
    torch.manual_seed(5)
    gm = trace(spread_out(Small()), torch.randn(2, 3, 9, 8))
    q = quantize(gm, target(name), [torch.randn(8, 3, 9, 8), torch.randn(3, 3, 9, 8) * 2], method)
    return gm, q, torch.randn(6, 3, 9, 8) * 2


def worst(gm: fx.GraphModule, q, sim: fx.GraphModule, x: Tensor) -> float:
    """Largest difference between simulation and numpy, in steps of that output."""
    with torch.no_grad():
        found = sim(x)
    steps = [q.value_params(find(gm, name))[0] for name in ("add", "fc")]
    expected = reference(gm, q, x.numpy())
    pairs = zip(found, expected, steps, strict=True)
    return max(float(np.abs(a.double().numpy() - b).max() / step) for a, b, step in pairs)


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("name", TARGETS)
def test_small_network_against_numpy(name: str, method: Method) -> None:
    gm, q, x = case(name, method)
    with torch.no_grad():
        assert simulate(q)(x)[0].unique().numel() > 30
        assert relative_error(gm(x), simulate(q)(x)) > 1e-4  # int8 does change it
    assert worst(gm, q, simulate(q), x) <= 1.01  # a rounding tie may fall to the other side, once


@pytest.mark.parametrize("fault", ["zero point", "weights per tensor", "add in float", "no bias"])
def test_planted_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gm, q, x = case("onnxruntime")
    assert worst(gm, q, simulate(q), x) <= 1.01
    if fault == "zero point":
        params = QuantSpec.params

        def shifted(self: QuantSpec, low: float, high: float) -> tuple[float, int]:
            scale, zero = params(self, low, high)
            return scale, zero + 6 if zero < 200 else zero - 6

        with monkeypatch.context() as patch:
            patch.setattr(QuantSpec, "params", shifted)
            sim = simulate(q)
    elif fault == "weights per tensor":
        for name, scale in q.calibration.weights.items():
            q.calibration.weights[name] = scale.amax().expand_as(scale).clone()
        sim = simulate(q)
    else:
        sim = simulate(q)
        for name, part in switches(sim).items():
            if fault == "add in float" and name in ("int8_act", "int8_pw"):
                part.enabled = False
            if fault == "no bias" and name == "dw":
                layer: Any = part.layer
                layer.bias.zero_()
    assert worst(gm, q, sim, x) > 1.5


# ----------------------------------------------------------------------------------- switches


def test_everything_off_is_the_float_network() -> None:
    gm, q, x = case("onnxruntime")
    sim = simulate(q)
    for part in switches(sim).values():
        part.enabled = False
    with torch.no_grad():
        assert relative_error(gm(x), sim(x)) == 0.0


@pytest.mark.parametrize("alone", ["stem", "dw", "pw", "fc"])
def test_one_layer_alone(alone: str) -> None:
    """Only this layer reads int8 and has int8 weights: the rest is exactly float."""
    gm, q, x = case("onnxruntime")
    sim = simulate(q)
    for name, part in switches(sim).items():
        part.enabled = name == alone or name.startswith(f"{alone}.")
    node = next(n for n in layers(gm) if n.name == alone)
    (source,) = node.all_input_nodes

    class One(fx.Interpreter):
        def run_node(self, n: fx.Node):
            if n.name != alone:
                return super().run_node(n)
            m, spec = module_of(gm, n), q.scheme.activations
            scale, zero = q.value_params(source)
            (value,) = self.fetch_args_kwargs_from_env(n)[0]
            value = torch.fake_quantize_per_tensor_affine(value, scale, zero, spec.qmin, spec.qmax)
            axis = None if isinstance(m, nn.Linear) else 0
            weight = torch.from_numpy(oracle.weight(m.weight.numpy(), axis)).float()
            tensors = {"weight": weight}
            if m.bias is not None:
                step = q.calibration.weights[alone] * scale
                tensors["bias"] = (m.bias / step).round() * step
            return torch.func.functional_call(m, tensors, (value,))

    with torch.no_grad():
        found, expected, exact = sim(x), One(gm).run(x), gm(x)
    assert relative_error(expected, found) < 1e-5
    assert relative_error(exact, found) > 1e-4


def test_switches_name_layers_and_values() -> None:
    _, q, _ = case("onnxruntime")
    found = switches(simulate(q))
    assert {n for n, m in found.items() if isinstance(m, QuantizedLayer)} == {
        "stem",
        "dw",
        "pw",
        "fc",
    }
    values = {n for n, m in found.items() if isinstance(m, FakeQuantize) and "." not in n}
    assert values == {"int8_act", "int8_pw", "int8_add", "int8_fc"}


def test_kept_layer_is_exact_and_reads_what_was_not_rounded() -> None:
    gm, q, x = case("onnxruntime")
    for node in layers(gm):
        node.meta["keep_float"] = True
    add = find(gm, "add")
    add.meta["keep_float"] = find(gm, "mean").meta["keep_float"] = True
    q = quantize(gm, target("onnxruntime"), [x])
    with torch.no_grad():
        assert relative_error(gm(x), simulate(q)(x)) == 0.0
    assert not switches(simulate(q))


# ------------------------------------------------------------------------------- what it keeps


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("seed", [0, 4, 8, 11])
def test_graph_is_not_touched_and_outputs_lie_on_their_grid(seed: int, name: str) -> None:
    gm = trace(network(seed), torch.randn(2, *SIZE))
    x = torch.randn(4, *SIZE)
    with torch.no_grad():
        before, code = gm(x), gm.code
    q = quantize(gm, target(name), [x])
    sim = simulate(q)
    with torch.no_grad():
        found = sim(x)
        assert relative_error(before, gm(x)) == 0.0
    assert gm.code == code
    assert not [m for m in gm.modules() if isinstance(m, (FakeQuantize, QuantizedLayer))]
    assert type(found) is type(before)
    flat = torch.utils._pytree.tree_leaves(found)
    unflatten(sim, flat)
    (output,) = gm.graph.find_nodes(op="output")
    for node, value in zip(outputs(gm), flat, strict=True):
        if node.name not in annotation(output).reads:
            continue
        scale, zero = q.value_params(node)
        stored = value / scale + zero
        assert (stored - stored.round()).abs().max() < 1e-2
        assert stored.min() > q.scheme.activations.qmin - 0.5
        assert stored.max() < q.scheme.activations.qmax + 0.5


def test_gradients_reach_every_weight() -> None:
    gm, q, x = case("onnxruntime")
    sim = simulate(q)
    for part in switches(sim).values():
        if isinstance(part, QuantizedLayer):
            part.layer.requires_grad_(True)
    sum(y.square().sum() for y in sim(x)).backward()
    for name, part in switches(sim).items():
        if isinstance(part, QuantizedLayer):
            assert part.layer.weight.grad is not None, name
            assert part.layer.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in gm.parameters())


def test_changed_weight_is_seen_after_refresh() -> None:
    _, q, x = case("onnxruntime")
    sim = simulate(q)
    with torch.no_grad():
        before = sim(x)
        part = switches(sim)["pw"]
        assert isinstance(part, QuantizedLayer)
        part.layer.weight.mul_(0.5)
        part.refresh()
        assert relative_error(before, sim(x)) > 1e-3


def test_shared_input_is_rounded_once_for_all_readers() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return torch.cat([y + y, y * y, y], 1)

    gm = trace(randomise(Fork()), torch.randn(2, *SIZE))
    sim = simulate(quantize(gm, target("onnxruntime"), [torch.randn(2, *SIZE)]))
    assert [n for n in switches(sim) if n == "int8_a" or n.startswith("int8_a_")] == ["int8_a"]


class Trunk(nn.Module):
    """A sum that a layer norm reads as floats, and a linear layer in int8."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        y = y + self.b(y)
        return self.c(y), self.fc(self.norm(y))


@pytest.mark.parametrize("name", ["onnxruntime", "per_tensor"])
def test_a_sum_with_a_float_reader_is_computed_in_floats(name: str) -> None:
    from rewriter.int8.onnx import to_onnx
    from rewriter.int8.onnx.session import Session

    torch.manual_seed(0)
    x = torch.randn(4, 7, 3) * 3
    q = quantize(trace(randomise(Trunk()).float(), x), target(name), [x])
    expected = simulate(q, kernels=True)(x)
    found = Session(to_onnx(q), threads=1).run(x)
    for a, b in zip(expected, found, strict=True):
        error = relative_error(torch.from_numpy(b), a.detach())
        assert error < 1e-6
