"""The int8 file: its arithmetic written by hand, what it stores, what ONNX Runtime makes of it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from rewriter import TARGETS, QuantizeError, quantize, simulate, target, trace
from rewriter.graph.lookup import find
from rewriter.int8.onnx.export import float_onnx, to_onnx
from rewriter.int8.onnx.session import Session
from rewriter.int8.simulate import Quantized

Array = np.ndarray[Any, Any]


class Mobile(nn.Module):
    """A small network with everything that a mobile one has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6())
        self.dw = nn.Sequential(nn.Conv2d(8, 8, (3, 5), padding=(1, 2), groups=8), nn.ReLU6())
        self.pw = nn.Conv2d(8, 8, 1)
        self.side = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 4, 1, bias=False), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.pw(self.dw(x))
        x = torch.cat([x, self.side(x)], 1)
        return self.head(self.pool(x).flatten(1))


def quantized(model: nn.Module, name: str, *shape: int) -> tuple[Quantized, Tensor]:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.uniform_(p, -0.6, 0.8)
    x = torch.randn(6, *shape)
    gm = trace(model.eval(), x[:2])
    return quantize(gm, target(name), [x]), x


def optimized(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    file = folder / "optimized.onnx"
    Session(model, threads=1, save_optimized=file)
    return Counter(n.op_type for n in onnx.load(file).graph.node)


def constants(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


# ------------------------------------------------------------------------------------ arithmetic


def by_hand(q: Quantized, x: Tensor) -> Array:
    """``Mobile`` in float64, written out, with every value rounded where it must be."""
    least, most = (-128, 127) if q.scheme.name in ("tensorrt", "tflite") else (0, 255)

    def value(v: Tensor, name: str) -> Tensor:
        scale, zero = q.value_params(find(q.gm, name))
        return (torch.clamp(torch.round(v / scale) + zero, least, most) - zero) * scale

    def layer(name: str, v: Tensor, source: str) -> Tensor:
        m: Any = q.gm.get_submodule(name)
        scale = q.calibration.weights[name.replace(".", "_")].double()
        wide = scale.view(-1, *[1] * (m.weight.ndim - 1)) if scale.ndim else scale
        weight = torch.clamp(torch.round(m.weight.double() / wide), -127, 127) * wide
        bias = None
        if m.bias is not None:
            step = scale * q.value_params(find(q.gm, source))[0]
            bias = torch.round(m.bias.double() / step) * step
        if isinstance(m, nn.Linear):
            return v @ weight.T + (0 if bias is None else bias)
        return torch.conv2d(v, weight, bias, m.stride, m.padding, m.dilation, m.groups)

    x = value(x.double(), "x")
    a = value(layer("stem.0", x, "x").clamp(0, 6), "stem_1")
    b = value(layer("dw.0", a, "stem_1").clamp(0, 6), "dw_1")
    b = value(layer("pw", b, "dw_1"), "pw")
    c = value(a + b, "add")
    d = nn.functional.max_pool2d(c, 3, 1, 1)
    d = value(layer("side.1", d, "add").clamp(0), "side_2")
    e = value(torch.cat([c, d], 1), "cat")
    f = value(e.mean((2, 3)), "pool")
    return value(layer("head", f, "flatten"), "head").numpy()


@pytest.mark.parametrize("name", TARGETS)
def test_the_file_computes_what_is_written_by_hand(name: str) -> None:
    q, x = quantized(Mobile(), name, 3, 19, 14)
    expected, step = by_hand(q, x), q.value_params(find(q.gm, "head"))[0]
    model = to_onnx(q)
    onnx.checker.check_model(model, full_check=True)
    for optimize in (False, True):
        for batch in (1, 6):
            found = Session(model, threads=1, optimize=optimize).run(x[:batch])[0]
            off = np.abs(found - expected[:batch]) / step
            # float32 against float64 may round a tie the other way, and kernels by one step
            assert off.max() < 1.5, f"optimize={optimize}"
            assert (off > 0.5).mean() <= (0.1 if not optimize else 0.4)


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])
def test_a_wrong_scale_in_the_file_is_seen(name: str) -> None:
    """The comparison above must see a weight scale that is 5 % off."""
    q, x = quantized(Mobile(), name, 3, 19, 14)
    model = to_onnx(q)
    tensor = next(t for t in model.graph.initializer if t.name == "pw.weight_scale")
    tensor.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.05), tensor.name)
    )
    step = q.value_params(find(q.gm, "head"))[0]
    off = np.abs(Session(model, optimize=False).run(x)[0] - by_hand(q, x)) / step
    assert (off > 0.5).mean() > 0.1 or off.max() > 1.5


@pytest.mark.parametrize("name", TARGETS)
def test_every_value_is_what_the_simulation_has(name: str) -> None:
    q, x = quantized(Mobile(), name, 3, 19, 14)
    names = ["stem_1", "dw_1", "pw", "add", "cat", "pool"]
    found = Session(to_onnx(q, names), threads=1, optimize=False).run(x)[1:]
    sim, seen = simulate(q), dict[str, Array]()

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                seen[n.name] = value.numpy()
            return value

    with torch.no_grad():
        Keep(sim).run(x)
    for node, value in zip(names, found, strict=True):
        scale, zero = q.value_params(find(q.gm, node))
        spec = find(q.gm, node).meta["int8"].output
        least, most = (-128, 127) if spec.signed else (0, 255)
        expected = (np.clip(np.round(seen[node] / scale) + zero, least, most) - zero) * scale
        assert (np.abs(value - expected) / scale).max() < 1.5, node
        assert (np.abs(value - expected) > scale / 2).mean() < 0.01, node


# --------------------------------------------------------------------------------- what is stored


def test_weights_are_int8_and_biases_int32() -> None:
    model = to_onnx(quantized(Mobile(), "onnxruntime", 3, 19, 14)[0])
    stored = constants(model)
    layers = ("stem_0", "dw_0", "pw", "side_1", "head")
    assert {stored[f"{n}.weight"].dtype for n in layers} == {np.dtype(np.int8)}
    assert {stored[f"{n}.bias"].dtype for n in layers if n != "side_1"} == {np.dtype(np.int32)}
    assert stored["dw_0.weight_scale"].shape == (8,)
    assert stored["head.weight_scale"].shape == ()
    assert not [n for n, a in stored.items() if a.dtype == np.float32 and a.size > 12]


class Axes(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(6, 4, (3, 2), 2, bias=True, groups=groups)
        self.rows = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(self.up(x))


def test_a_scale_for_each_channel_lies_on_the_axis_of_the_output_channels() -> None:
    q, x = quantized(Axes(), "tensorrt", 6, 4, 5)
    model = to_onnx(q)
    axes = {
        n.input[0]: next((a.i for a in n.attribute if a.name == "axis"), None)
        for n in model.graph.node
        if n.op_type == "DequantizeLinear"
    }
    stored = constants(model)
    assert axes["up.weight"] == 1
    assert stored["up.bias"].dtype == np.float32  # TensorRT adds biases in float
    assert stored["up.weight_scale"].shape == (4,)
    assert axes["rows.weight"] == 1  # stored transposed for a product with many rows
    assert stored["rows.weight"].shape == (10, 7)
    with torch.no_grad():
        expected = simulate(q)(x).numpy()
    found = Session(model, threads=1, optimize=False).run(x)[0]
    assert np.abs(found - expected).max() < 1.5 * q.value_params(find(q.gm, "rows"))[0]


def test_a_grouped_transposed_convolution_has_one_scale() -> None:
    q, _ = quantized(Axes(groups=2), "onnxruntime", 6, 4, 5)
    assert constants(to_onnx(q))["up.weight_scale"].shape == ()


def test_values_that_are_only_moved_keep_scale_and_zero_point() -> None:
    model = to_onnx(quantized(Mobile(), "onnxruntime", 3, 19, 14)[0])
    owners = {n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    # the max pool has its input's range, the flattened value that of the pool
    assert owners == {
        f"{n}.scale" for n in ("x", "stem_1", "dw_1", "pw", "add", "side_2", "cat", "pool", "head")
    }


def test_a_bias_that_int32_cannot_hold_is_refused() -> None:
    q, _ = quantized(Mobile(), "onnxruntime", 3, 19, 14)
    q.calibration.weights["pw"] = q.calibration.weights["pw"] * 1e-9
    with pytest.raises(QuantizeError, match=r"pw: bias: .* steps"):
        to_onnx(q)


def test_a_value_without_a_range_is_refused() -> None:
    q, _ = quantized(Mobile(), "onnxruntime", 3, 19, 14)
    del q.calibration.values["add"]
    with pytest.raises(QuantizeError, match="add: range: not calibrated"):
        to_onnx(q)


def test_an_unknown_extra_output_is_refused() -> None:
    q, _ = quantized(Mobile(), "onnxruntime", 3, 19, 14)
    with pytest.raises(QuantizeError, match="no node called 'nothing'"):
        to_onnx(q, ["nothing"])


def test_a_layer_kept_in_float_is_float() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 19, 14)
    gm = trace(Mobile().eval(), x)
    find(gm, "dw_0").meta["keep_float"] = True
    q = quantize(gm, target("onnxruntime"), [x])
    model = to_onnx(q)
    assert constants(model)["dw_0.weight"].dtype == np.float32
    node = next(n for n in model.graph.node if n.name == "dw_0.Conv")
    assert not node.input[0].endswith(".dq")
    with torch.no_grad():
        expected = simulate(q)(x).numpy()
    found = Session(model, threads=1, optimize=False).run(x)[0]
    assert np.abs(found - expected).max() < 1.5 * q.value_params(find(gm, "head"))[0]


# ------------------------------------------------------------------------------------------ clips


class Clipped(nn.Module):
    def __init__(self, clip: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.clip = nn.Conv2d(3, 6, 3), clip
        self.second = after or nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.clip(self.first(x)))


CLIPS = [
    (nn.ReLU6(), "onnxruntime", (0.0, 6.0), False),
    (nn.ReLU6(), "onnxruntime", (0.0, 2.5), False),
    (nn.ReLU6(), "onnxruntime", (0.0, 6.5), True),  # the last steps stand for more than 6
    (nn.ReLU6(), "onnxruntime", (-1.0, 6.0), True),  # the first steps for less than 0
    (nn.ReLU(), "onnxruntime", (0.0, 9.0), False),
    (nn.ReLU(), "onnxruntime", (-0.5, 9.0), True),
    (nn.Hardtanh(-1.0, 2.0), "onnxruntime", (-0.5, 1.5), False),
    (nn.Hardtanh(-1.0, 2.0), "onnxruntime", (-1.5, 1.5), True),
    (nn.ReLU(), "tensorrt", (0.0, 9.0), True),  # symmetric: half of the steps are negative
    (nn.ReLU6(), "tflite", (0.0, 6.0), False),
]


@pytest.mark.parametrize(("clip", "name", "limits", "kept"), CLIPS, ids=str)
def test_a_clip_is_left_out_exactly_where_saturation_does_the_same(
    clip: nn.Module, name: str, limits: tuple[float, float], kept: bool
) -> None:
    q, x = quantized(Clipped(clip), name, 3, 9, 8)
    q.calibration.values["clip"] = limits
    x = x * 9  # far beyond the limits
    model = to_onnx(q, ["clip"])  # as an output of its own, the clip stays
    assert any(n.op_type in ("Relu", "Clip") for n in model.graph.node)
    expected = Session(model, threads=1, optimize=False).run(x)[0]
    model = to_onnx(q)
    assert any(n.op_type in ("Relu", "Clip") for n in model.graph.node) == kept
    np.testing.assert_array_equal(Session(model, threads=1, optimize=False).run(x)[0], expected)


def test_a_clip_with_a_float_reader_stays() -> None:
    q, _ = quantized(
        Clipped(nn.ReLU6(), nn.Sequential(nn.Softplus(), nn.Conv2d(6, 2, 1))),
        "tensorrt",  # its kernels write floats too
        3,
        9,
        8,
    )
    assert any(n.op_type == "Clip" for n in to_onnx(q).graph.node)


# ----------------------------------------------------------------------------------- the runtime


@pytest.mark.parametrize("name", ["onnxruntime", "per_tensor"])
def test_all_of_a_mobile_network_runs_in_int8(name: str, tmp_path: Path) -> None:
    kinds = optimized(to_onnx(quantized(Mobile(), name, 3, 19, 14)[0]), tmp_path)
    assert kinds["QLinearConv"] == 4
    assert kinds["QLinearAdd"] == kinds["QLinearConcat"] == kinds["QGemm"] == 1
    assert kinds["QLinearGlobalAveragePool"] == 1
    assert kinds["QuantizeLinear"] == kinds["DequantizeLinear"] == 1
    assert not {"Conv", "FusedConv", "Clip", "Relu", "Add", "Gemm", "MaxPool"} & kinds.keys()


def test_a_zero_pad_becomes_padding_of_the_convolution(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(4, 5, 3, 2, 1))
    q, x = quantized(model, "onnxruntime", 3, 9, 8)
    emitted = to_onnx(q)
    assert not any(n.op_type == "Pad" for n in emitted.graph.node)
    assert optimized(emitted, tmp_path)["QLinearConv"] == 2
    with torch.no_grad():
        expected = simulate(q)(x).numpy()
    found = Session(emitted, threads=1, optimize=False).run(x)[0]
    assert np.abs(found - expected).max() < 1.5 * q.value_params(find(q.gm, "_2"))[0]


def test_the_mean_over_places_runs_in_int8(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).mean((2, 3)))

    kinds = optimized(to_onnx(quantized(Mean(), "onnxruntime", 3, 9, 8)[0]), tmp_path)
    assert kinds["QLinearGlobalAveragePool"] == kinds["QGemm"] == kinds["DequantizeLinear"] == 1


def test_a_fresh_process_needs_only_numpy_and_onnxruntime(tmp_path: Path) -> None:
    q, x = quantized(Mobile(), "onnxruntime", 3, 19, 14)
    onnx.save(to_onnx(q), tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", x.numpy())
    script = (
        "import sys, numpy as np, onnxruntime as ort\n"
        "s = ort.InferenceSession('model.onnx', providers=['CPUExecutionProvider'])\n"
        "np.save('y.npy', s.run(None, {s.get_inputs()[0].name: np.load('x.npy')})[0])\n"
        "assert not {'torch', 'onnx', 'rewriter'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), Session(to_onnx(q)).run(x)[0])


def test_session_takes_a_model_its_bytes_or_a_file_and_runs_all_batches(tmp_path: Path) -> None:
    model = float_onnx(trace(Mobile().eval(), torch.randn(2, 3, 19, 14)))
    onnx.save(model, tmp_path / "model.onnx")
    x = torch.randn(5, 3, 19, 14)
    expected = Session(model).run(x)[0]
    for source in (
        model.SerializeToString(),
        tmp_path / "model.onnx",
        str(tmp_path / "model.onnx"),
    ):
        found = Session(source, threads=1).run_all(x.split(2))[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_width_that_onnx_cannot_store_is_refused() -> None:
    q, _ = quantized(Mobile(), "onnxruntime", 3, 19, 14)
    wide = replace(q.scheme, activations=replace(q.scheme.activations, bits=12))
    with pytest.raises(QuantizeError, match="bits of an activation: 12"):
        to_onnx(quantize(q.gm, wide, [torch.randn(2, 3, 19, 14)]))
