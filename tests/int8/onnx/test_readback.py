"""Networks of operators at random: the float function stays, and every layer runs on an int8 kernel."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter import trace
from rewriter.graph.cost import cost, node_macs
from rewriter.graph.lookup import layer_name, layers
from rewriter.int8.annotate import annotation
from rewriter.int8.onnx.compare import compare
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.readback import by_annotation, opened
from rewriter.int8.scheme import target
from rewriter.int8.simulate import Quantized, quantize, simulate

CHANNELS = 6


class Frozen(nn.Module):
    """A batch norm written out as arithmetic, as detectors have it."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean"):
            self.register_buffer(name, torch.randn(CHANNELS))
        self.register_buffer("var", torch.rand(CHANNELS) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (
            self.bias.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale
        )


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def norm() -> nn.Module:
    made = nn.BatchNorm2d(CHANNELS)
    made.running_mean.normal_()  # type: ignore[union-attr]
    made.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    nn.init.normal_(made.weight, 1, 0.3)
    nn.init.normal_(made.bias)
    return made.eval()


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


OPERATORS: dict[str, Callable[[], nn.Module]] = {
    "frozen": Frozen,
    "norm": norm,
    "layer_scale": LayerScale,
    "scalar": lambda: Apply(lambda x: x * 0.1),
    "shifted": lambda: Apply(lambda x: 1.5 - x / 3),
    "added": lambda: Apply(lambda x: x + 0.25),
    "negative": lambda: Apply(lambda x: -x),
    "normalized": lambda: Apply(lambda x: (x - 0.45) / 0.225),
    "group_norm": lambda: nn.GroupNorm(2, CHANNELS),
    "instance_norm": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "layer_norm": lambda: Apply(lambda x: F.layer_norm(x, x.shape[1:])),
    "relu": nn.ReLU,
    "mish": nn.Mish,
    "quick_gelu": lambda: Apply(lambda x: x * torch.sigmoid(1.702 * x)),
    "selu": nn.SELU,
    "celu": nn.CELU,
    "glu": lambda: Apply(lambda x: F.glu(torch.cat([x, x + 1], 1), 1)),
    "relu_squared": lambda: Apply(lambda x: F.relu(x) ** 2),
    "sub": lambda: Apply(lambda x: x - F.avg_pool2d(x, 3, 1, 1)),
    "max": lambda: Apply(lambda x: torch.maximum(x, x.mean((2, 3), keepdim=True))),
    "abs": lambda: Apply(torch.abs),
    "pow": lambda: Apply(lambda x: x.clamp(min=0.01) ** 1.5),
    "keras": lambda: Apply(lambda x: x * (x * 0.2 + 0.5).clamp(0, 1)),
    "sixth": lambda: Apply(lambda x: (x / 6 + 0.5).clamp(0, 1)),
    "relu6": lambda: Apply(lambda x: F.relu6(1.2 * x + 3) / 6),
    "swish": lambda: Apply(lambda x: x * F.relu6(x + 3) / 6),
    "gate": lambda: Apply(lambda x: x * (x.mean((2, 3), keepdim=True) * 0.2 + 0.5).clamp(0, 1)),
    "resize": lambda: Apply(lambda x: F.interpolate(x, size=(11, 13), mode="bilinear")),
    "corners": lambda: Apply(
        lambda x: F.interpolate(x, size=(7, 10), mode="bilinear", align_corners=True)
    ),
    "nearest": lambda: Apply(lambda x: F.interpolate(x, size=(13, 9))),
    "shrunk": lambda: Apply(lambda x: F.interpolate(x, size=(6, 7), mode="bicubic")),
}
# These are computed in float between int8 values; all others have an int8 form.
FLOAT = {"InstanceNormalization", "LayerNormalization", "Softplus", "Mish"}


class Network(nn.Module):
    """Convolutions with operators in between, and a classifier."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.operators = nn.ModuleList(OPERATORS[name]() for name in names)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=i % 2) for i in range(len(names))
        )
        self.last = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for operation, convolution in zip(self.operators, self.convolutions, strict=True):
            x = convolution(operation(x))
        return self.last(x.mean((2, 3)))


def network(names: list[str], seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return Network(names).eval(), torch.randn(12, 3, 12, 14)


def quantized(model: nn.Module, x: Tensor, name: str = "onnxruntime") -> Quantized:
    return quantize(trace(model, x[:2]), target(name), [x])


def holds(names: list[str], seed: int) -> None:
    model, x = network(names, seed)
    q = quantized(model, x)
    with torch.no_grad():
        expected, found = model(x), q.gm(x)
    assert (expected - found).abs().max() <= 1e-5 * (1 + expected.abs().max())
    session, facts = opened(q, to_onnx(q), threads=1)
    assert facts.int8_share == 1.0, (names, facts)
    assert not facts.float_layers
    with torch.no_grad():
        simulated = simulate(q, kernels=True)(x)
    for batch in (1, 3):
        (made,) = session.run(x[:batch])
        # single steps on the way move the output by a few of its own
        step = q.value_params(_last(q.gm))[0]
        assert (torch.from_numpy(made) - simulated[:batch]).abs().max() <= 6.5 * step, names


def _last(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in reversed(gm.graph.nodes) if n.op != "output" and annotation(n).output)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_layer_runs_in_int8_beside_this_operator(name: str) -> None:
    holds([name], 0)


@pytest.mark.parametrize("seed", range(12))
def test_every_layer_runs_in_int8_beside_operators_at_random(seed: int) -> None:
    holds(random.Random(seed).choices(list(OPERATORS), k=4), seed)


TRANSPOSED: list[dict[str, Any]] = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 5, "stride": 3, "padding": 2, "output_padding": 2},
    {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0)},
    {"kernel_size": 3, "stride": 2, "groups": 2},
    {"kernel_size": 4, "stride": 2, "padding": 3},
    {"kernel_size": 1, "stride": 2},
]


@pytest.mark.parametrize("settings", TRANSPOSED, ids=str)
@pytest.mark.parametrize("act", [nn.Identity(), nn.ReLU(), nn.ReLU6()], ids=repr)
def test_a_transposed_convolution_is_an_int8_convolution(
    settings: dict[str, Any], act: nn.Module
) -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(8, 6, **settings)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), up, act, nn.Conv2d(6, 4, 3))
    q = quantized(model.eval(), torch.randn(8, 3, 9, 11))
    session, facts = opened(q, to_onnx(q), threads=1)
    assert facts.int8_share == 1.0
    assert not facts.float_ops
    x = torch.randn(3, 3, 9, 11)
    assert max(row.largest for row in compare(q, x)) == 0
    assert len(session.run(x[:1])[0]) == 1


def test_a_transposed_convolution_with_two_strides_is_named() -> None:
    up = nn.ConvTranspose2d(8, 6, 3, stride=(1, 2))
    q = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), up).eval(), torch.randn(4, 3, 9, 11))
    _, facts = opened(q, to_onnx(q), threads=1)
    macs = node_macs(q.gm)
    (left,) = facts.float_layers
    assert left.layer == "1"
    assert left.macs == macs["_1"]
    assert "transposed" in left.reason
    assert facts.float_ops == {"ConvTranspose": 1}
    assert facts.int8_share == pytest.approx(macs["_0"] / sum(macs.values()))


def test_macs_of_every_kind_add_up_to_the_cost() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, groups=1, padding=1)
            self.up = nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
            self.rnn = nn.LSTM(8, 5, batch_first=True, bidirectional=True)
            self.fc = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(self.conv(x)).mean(2).transpose(1, 2)
            y = torch.softmax(y @ y.transpose(1, 2), -1) @ y
            y = torch.einsum("nij,nkj->nik", y, y) @ y
            y = F.scaled_dot_product_attention(y, y, y)
            return self.fc(self.rnn(y)[0])

    gm = trace(Net().eval(), torch.randn(2, 3, 6, 5))
    assert sum(node_macs(gm).values()) == cost(gm).macs


def test_a_layer_kept_in_float_is_said_and_counted() -> None:
    model, x = network(["relu"])
    gm = trace(model, x[:2])
    layer = next(n for n in gm.graph.nodes if n.target == "convolutions.0")
    layer.meta["keep_float"] = True
    q = quantize(gm, target("onnxruntime"), [x])
    _, facts = opened(q, to_onnx(q), threads=1)
    reasons = {row.layer: row.reason for row in facts.float_layers}
    assert reasons["convolutions.0"] == "kept in float, as asked"
    macs = node_macs(gm)
    inside = sum(macs[n.name] for n in layers(gm) if layer_name(n) not in reasons)
    assert facts.int8_share == pytest.approx(inside / sum(macs.values()))
    assert by_annotation(q).int8_share == pytest.approx(1 - macs[layer.name] / sum(macs.values()))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "corners", "bicubic"])
@pytest.mark.parametrize("size", [(24, 31), (17, 20), (24, 30), (7, 9), (36, 45)])
def test_a_resize_to_any_size_lies_between_int8_values(mode: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    kind = "bilinear" if mode == "corners" else mode
    up = nn.Upsample(size=size, mode=kind, align_corners=True if mode == "corners" else None)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), up, nn.Conv2d(6, 4, 3))
    x = torch.randn(4, 3, 12, 15)
    q = quantized(model.eval(), x)
    session, facts = opened(q, to_onnx(q), threads=1)
    assert facts.int8_share == 1.0
    one, three = session.run(x[:1])[0], session.run(x[:3])[0]
    assert one.shape[2:] == (size[0] - 2, size[1] - 2)
    assert (one == three[:1]).all()
    rows = compare(q, x[:3])
    # where the factor is whole many values lie next to a tie
    assert max(row.largest for row in rows) <= 1.001
    assert max(row.differs for row in rows) <= 0.01
