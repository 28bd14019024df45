"""Networks of operators at random: the float function stays, and every layer runs on an int8 kernel."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter import trace
from rewriter.int8.annotate import annotation
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.readback import opened
from rewriter.int8.scheme import target
from rewriter.int8.simulate import Quantized, quantize, simulate

CHANNELS = 6


class Frozen(nn.Module):
    """A batch norm written out as arithmetic, as detectors have it."""

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
