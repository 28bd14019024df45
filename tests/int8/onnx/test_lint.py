"""Findings about an exported file: each appears where its cause was planted, and only there."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from rewriter import quantize, target, trace
from rewriter.graph.lookup import find, layers
from rewriter.int8.calibrate import input_scale
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.lint import Finding, int8_dot_product, lint
from rewriter.int8.onnx.session import Session
from rewriter.int8.simulate import Quantized


class Net(nn.Module):
    """Convolution, activation, convolution, and a concatenation of both."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 6, 3), act
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.last(torch.cat([x, self.second(x)], 1))


def quantized(model: nn.Module, name: str = "onnxruntime", keep: str = "") -> Quantized:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.uniform_(p, -0.6, 0.8)
    x = torch.randn(4, 3, 9, 8)
    gm = trace(model.eval(), x)
    if keep:
        find(gm, keep).meta["keep_float"] = True
    return quantize(gm, target(name), [x])


def findings(q: Quantized, code: str) -> list[Finding]:
    return [f for f in lint(q, to_onnx(q)) if f.code == code]


def test_a_plain_network_has_no_findings() -> None:
    q = quantized(Net(nn.ReLU()))
    with torch.no_grad():
        q.gm.get_parameter("second.weight").mul_(0.3)
    q = quantize(q.gm, q.scheme, [torch.randn(4, 3, 9, 8)])
    assert [f for f in lint(q, to_onnx(q)) if f.code != "saturation"] == []


def biased(ratio: float, shrink: float = 1.0) -> Quantized:
    """A filter of 576 weights whose bias is ``ratio`` times what int32 steps of its own scale hold."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act = nn.Conv2d(3, 64, 3), nn.ReLU()
            self.second, self.last = nn.Conv2d(64, 6, 3), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.act(self.first(x))))

    q = quantized(Wide())
    layer, step = q.gm.second, input_scale(q.gm, find(q.gm, "second"), q.calibration.values)
    assert step is not None
    with torch.no_grad():
        layer.weight[2] *= shrink
        layer.bias[2] = ratio * 2.0**30 * step * float(layer.weight[2].abs().max()) / 127
    return quantize(q.gm, q.scheme, [torch.randn(4, 3, 9, 8)])


def test_a_bias_that_costs_its_weights_a_bit_is_found() -> None:
    (finding,) = findings(biased(2.8), "bias_overflow")
    assert finding.node == "second"
    assert finding.message.startswith("1 of 6 weight scales")


def test_a_scale_that_is_hardly_coarser_is_none() -> None:
    assert findings(biased(1.3), "bias_overflow") == []


def test_a_bias_over_weights_that_are_never_seen_is_none() -> None:
    """Behind equalization dead channels have tiny weights: their outputs are their biases, however coarse the weights."""
    q = quantized(Net(nn.ReLU()))
    with torch.no_grad():
        q.gm.second.weight[2] *= 1e-13
    q = quantize(q.gm, q.scheme, [torch.randn(4, 3, 9, 8)])
    assert findings(q, "bias_overflow") == []


def test_a_range_that_a_concatenation_merges_is_found() -> None:
    q = quantized(Net(nn.ReLU()))
    with torch.no_grad():
        q.gm.get_parameter("second.weight").mul_(60)
    q = quantize(q.gm, q.scheme, [torch.randn(4, 3, 9, 8)])
    (finding,) = findings(q, "merged_range")
    assert finding.node == "cat"
    assert finding.message.startswith("act spans")
    find(q.gm, "act").meta["rewritten_by"] = "split_head_2@act"
    (finding,) = findings(q, "merged_range")
    assert finding.message.endswith("it undoes split_head_2@act")


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        ("flags : fpu sse2 avx2 avx512_vnni", True),
        ("flags : fpu sse2 avx2 avx_vnni", True),
        ("flags : fpu sse2 avx2 avx512f", False),
        ("Features : fp asimd asimddp", True),
        ("model : something else", None),
    ],
)
def test_int8_dot_product_by_the_processor_flags(flags: str, known: bool | None) -> None:
    assert int8_dot_product(f"processor : 0\n{flags}\n") is known


@pytest.mark.parametrize(
    ("known", "name", "words"),
    [
        (True, "onnxruntime", None),
        (False, "onnxruntime", "has no VNNI"),
        (None, "onnxruntime", "unknown"),
        (False, "tflite", None),  # int8 activations do not saturate
    ],
)
def test_saturation(
    known: bool | None, name: str, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["rewriter.int8.onnx.lint"], "int8_dot_product", lambda: known)
    found = findings(quantized(Net(nn.ReLU()), name), "saturation")
    assert [words in f.message for f in found] == ([] if words is None else [True])


FLOAT = [
    (nn.Softplus(), "tensorrt", "", {"first": "Softplus"}),
    (nn.ReLU(), "onnxruntime", "second", {"second": "as asked", "first": "read in float"}),
    (nn.ReLU(), "tensorrt", "", {"first": "tighter than the int8 range"}),
]


@pytest.mark.parametrize(("act", "name", "keep", "expected"), FLOAT, ids=str)
def test_layers_that_run_in_float_are_named_with_the_reason(
    act: nn.Module, name: str, keep: str, expected: dict[str, str]
) -> None:
    found = {f.node: f.message for f in findings(quantized(Net(act), name, keep), "float_layer")}
    assert found.keys() == expected.keys()
    for node, words in expected.items():
        assert words in found[node]


# not "tflite": there a layer kept in float reads what DequantizeLinear makes, and ONNX Runtime then quantizes its
# weights by itself; such networks are written as .tflite files
@pytest.mark.parametrize("keep", ["", "first", "second"])
@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt", "qnn"])
@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.Hardswish(), nn.GELU()], ids=repr
)
def test_the_named_layers_are_those_that_the_runtime_runs_in_float(
    act: nn.Module, name: str, keep: str, tmp_path: Path
) -> None:
    q = quantized(Net(act), name, keep)
    model = to_onnx(q)
    Session(model, threads=1, save_optimized=tmp_path / "optimized.onnx")
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    named = [f for f in lint(q, model) if f.code == "float_layer"]
    assert kinds["QLinearConv"] == len(layers(q.gm)) - len(named)


def test_a_quantizer_between_a_layer_and_its_clip_is_found() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act = nn.Conv2d(3, 6, 3), nn.ReLU()
            self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.left(x) + self.right(self.act(x))

    found = findings(quantized(Twice()), "split_pattern")
    assert [(f.node, f.message) for f in found] == [
        ("act", "a quantizer lies between first and its clip")
    ]
