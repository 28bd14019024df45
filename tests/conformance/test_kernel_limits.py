"""The table of what kernels prescribe, against the runtime that prescribes it and the documents where none is at hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rewriter import TARGETS, Quantized, quantize, target, trace
from rewriter.int8.annotate import OPERATIONS, Annotation, annotation

# Target, operation: scale and zero point. By LiteRT's specification of int8, and by what QNN's HTP was seen to do.
FIXED = {
    ("tflite", "sigmoid", 8): (1 / 256, -128),
    ("tflite", "hardsigmoid", 8): (1 / 256, -128),
    ("tflite", "tanh", 8): (1 / 128, 0),
    ("tflite", "softmax", 8): (1 / 256, -128),
    ("tflite", "l2_norm", 8): (1 / 128, 0),
    ("qnn", "sigmoid", 8): (1 / 256, 0),
    ("qnn", "hardsigmoid", 8): (1 / 256, 0),
    ("qnn", "sigmoid", 16): (1 / 65536, 0),
    ("qnn", "tanh", 16): (1 / 32768, 32768),
}


class Net(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Conv2d(3, 4, 1), act, nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)))


def quantized(act: nn.Module, name: str) -> Quantized:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 7)
    return quantize(trace(Net(act).eval(), x[:2]), target(name), [x])


def test_the_table_of_fixed_ranges() -> None:
    found = {
        (name, r.operation, r.bits): (r.scale, r.zero_point)
        for name, scheme in TARGETS.items()
        for r in scheme.fixed_ranges
    }
    assert found == FIXED
    assert {operation for _, operation, _ in FIXED} <= set(OPERATIONS.values())


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh()], ids=repr)
def test_a_fixed_range_is_what_the_value_gets(act: nn.Module, name: str) -> None:
    q = quantized(act, name)
    (node,) = [n for n in q.gm.graph.nodes if n.name == "act"]
    fixed = FIXED.get((name, type(act).__name__.lower(), 8))
    if annotation(node).output is None:
        assert fixed is None
        return
    params = q.value_params(node)
    assert params == fixed if fixed else params[0] not in (1 / 256, 1 / 128)


@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.Softmax(1)], ids=repr)
def test_litert_refuses_any_other_range(act: nn.Module) -> None:
    """Its tanh takes any by a table; there the specification alone is held."""
    pytest.importorskip("ai_edge_litert")
    from rewriter.int8.litert import Session, to_tflite

    q = quantized(act, "tflite")
    Session(to_tflite(q), kernels="builtin")
    (node,) = [n for n in q.gm.graph.nodes if n.name == "act"]
    note: Annotation = annotation(node)
    assert note.output is not None
    other = replace(note.output, fixed=(1 / 200, 0))
    node.meta["int8"] = replace(note, output=other)
    with pytest.raises(RuntimeError, match=r"scale|zero_point|params"):
        Session(to_tflite(q), kernels="builtin")


def test_other_limits() -> None:
    assert TARGETS["tensorrt"].float_bias and not TARGETS["onnxruntime"].float_bias
    assert TARGETS["tensorrt"].activations.qmin == -128
    assert TARGETS["qnn"].least_weight_scale == 1e-4
    assert TARGETS["tflite"].inner_values == {nn.SiLU}
    assert TARGETS["tflite"].shared_at == {"cat", "pool", "resize"}
    assert {n for n, s in TARGETS.items() if s.static_batch} == {"tflite", "qnn"}


def test_a_dead_channel_keeps_a_weight_scale_that_qnn_can_hold() -> None:
    torch.manual_seed(0)
    model = Net(nn.ReLU()).eval()
    model.first.weight.data[1] = 1e-9
    x = torch.randn(4, 3, 5, 7)
    scales = quantize(trace(model, x[:2]), target("qnn"), [x]).calibration.weights["first"]
    assert float(scales.min() / scales.max()) == pytest.approx(1e-4)
    plain = quantize(trace(model, x[:2]), target("onnxruntime"), [x]).calibration.weights["first"]
    assert float(plain.min() / plain.max()) < 1e-5
