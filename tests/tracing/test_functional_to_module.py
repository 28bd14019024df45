"""Functions and methods that become modules, and those that must not."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.graph.lookup import layer_name, layers, module_of
from tests.networks import Forward, conv, kinds, made, randomise, traced

F = nn.functional
IMAGE = (3, 11, 9)


class FunctionalConv(nn.Module):
    def __init__(self, i: int, o: int, k: int, groups: int = 1, **more: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i // groups, k, k))
        self.bias = nn.Parameter(torch.randn(o))
        self.groups, self.more = groups, more

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, bias=self.bias, groups=self.groups, **self.more)


class GainedConv(FunctionalConv):
    """Reads another parameter of the same module after the convolution."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.gain = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FrozenBatchNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        b = self.bn
        return F.batch_norm(x, b.running_mean, b.running_var, b.weight, b.bias, False, 0.1, b.eps)


def test_functional_convolution_is_named_by_its_module() -> None:
    model = nn.Sequential(FunctionalConv(3, 4, 3, stride=(2, 1), padding=1), nn.ReLU())
    model.append(FunctionalConv(4, 4, 3, groups=4, dilation=2))
    gm = traced(randomise(model), 3, 15, 13)
    assert kinds(gm) == ["Conv2d", "ReLU", "Conv2d"]
    assert [layer_name(n) for n in layers(gm)] == ["0", "2"]
    assert module_of(gm, layers(gm)[1]).groups == 4


def test_another_parameter_of_a_functional_module_survives() -> None:
    gm = traced(randomise(GainedConv()), IMAGE)
    assert kinds(gm) == ["Conv2d"]  # a gain for each channel is folded
    gm = traced(randomise(nn.Sequential(GainedConv(), nn.ReLU())), IMAGE)
    assert kinds(gm) == ["Conv2d", "ReLU"]
    assert layer_name(layers(gm)[0]) == "0"


def test_weights_computed_from_weights_are_constants() -> None:
    gm = traced(randomise(nn.Sequential(StandardisedConv(3, 4, 3), nn.BatchNorm2d(4))), IMAGE)
    assert kinds(gm) == ["Conv2d"]
    assert layer_name(layers(gm)[0]) == "0"


def test_functional_batch_norm_is_folded() -> None:
    assert made(nn.Sequential(conv(), FrozenBatchNorm(4))) == ["Conv2d"]


def test_functional_batch_norm_of_vectors_and_sequences() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(297, 5), FrozenBatchNorm(5))
    assert made(model) == ["flatten", "Linear"]
    assert made(nn.Sequential(nn.Conv1d(3, 5, 3), FrozenBatchNorm(5)), 3, 12) == ["Conv1d"]


def hard_by_hand(self, x):
    x = self.conv(x)
    return x * F.relu6(x + 3) / 6


def hard_by_hand_turned(self, x):
    x = self.conv(x)
    return torch.clamp(3 + x, min=0, max=6).mul(1 / 6).mul(x)


def hard_in_place(self, x):
    x = self.conv(x)
    return x.mul(x.add(3.0).clamp_(0.0, 6.0).div_(6.0))


def hard_sigmoid(self, x):
    return F.hardtanh(self.conv(x) + 3, 0.0, 6.0) / 6


def swish(self, x):
    x = self.conv(x)
    return x.sigmoid() * x


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (hard_by_hand, "Hardswish"),
        (hard_by_hand_turned, "Hardswish"),
        (hard_in_place, "Hardswish"),
        (hard_sigmoid, "Hardsigmoid"),
        (swish, "SiLU"),
        (lambda s, x: F.hardtanh(s.conv(x), 0, 6), "ReLU6"),
        (lambda s, x: s.conv(x).clamp(0, 6), "ReLU6"),
        (lambda s, x: s.conv(x).clamp(min=0), "ReLU"),
        (lambda s, x: s.conv(x).clamp_min(0), "ReLU"),
        (lambda s, x: torch.clip(s.conv(x), -1, 1.5), "Hardtanh"),
        (lambda s, x: F.relu6(input=s.conv(x)), "ReLU6"),
        (lambda s, x: F.leaky_relu(s.conv(x), 0.3, True), "LeakyReLU"),
        (lambda s, x: F.elu(s.conv(x), alpha=0.7), "ELU"),
        (lambda s, x: F.gelu(s.conv(x), approximate="tanh"), "GELU"),
        (lambda s, x: F.softplus(s.conv(x), 2, 10), "Softplus"),
        (lambda s, x: F.mish(s.conv(x)), "Mish"),
        (lambda s, x: F.silu(s.conv(x), inplace=True), "SiLU"),
        (lambda s, x: s.conv(x).tanh(), "Tanh"),
        (lambda s, x: s.conv(x).softmax(-1), "Softmax"),
        (lambda s, x: F.softmax(s.conv(x), dim=1), "Softmax"),
        (lambda s, x: F.prelu(s.conv(x), s.slope), "PReLU"),
        (lambda s, x: F.max_pool2d(s.conv(x), 3, 2, 1, ceil_mode=True), "MaxPool2d"),
        (lambda s, x: F.avg_pool2d(s.conv(x), (3, 2), 1, 1, False, False), "AvgPool2d"),
        (lambda s, x: F.adaptive_avg_pool2d(s.conv(x), (2, 1)), "AdaptiveAvgPool2d"),
        (lambda s, x: F.adaptive_max_pool2d(s.conv(x), 1), "AdaptiveMaxPool2d"),
        (lambda s, x: F.pad(s.conv(x), (1, 2, 0, 3)), "ZeroPad2d"),
        (lambda s, x: F.pad(s.conv(x), [2, 1]), "ZeroPad2d"),
        (lambda s, x: F.interpolate(s.conv(x), size=x.shape[2:]), "Upsample"),
        (lambda s, x: F.interpolate(s.conv(x), None, 2.0, "bilinear", False), "Upsample"),
        (lambda s, x: F.pixel_shuffle(s.conv(x), 2), "PixelShuffle"),
        (lambda s, x: F.layer_norm(s.conv(x), (9, 7), s.g, s.b), "LayerNorm"),
        (lambda s, x: F.linear(s.conv(x), s.matrix), "Linear"),
        (
            lambda s, x: F.conv_transpose2d(s.conv(x), s.turned, None, 2, 1, 1, 2),
            "ConvTranspose2d",
        ),
        (lambda s, x: F.conv2d(s.conv(x), s.kernel, padding="same"), "Conv2d"),
    ],
)
def test_function_becomes_module(function, name: str) -> None:
    parts = {
        "conv": conv(),
        "slope": nn.Parameter(torch.rand(4)),
        "g": nn.Parameter(torch.rand(9, 7)),
        "b": nn.Parameter(torch.rand(9, 7)),
        "matrix": nn.Parameter(torch.randn(5, 7)),
        "turned": nn.Parameter(torch.randn(4, 3, 3, 3)),
        "kernel": nn.Parameter(torch.randn(6, 4, 3, 3)),
    }
    assert made(Forward(function, **parts)) == ["Conv2d", name]


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: F.pad(s.conv(x), (1, 2, 0, 3), mode="reflect"),
        lambda s, x: F.pad(s.conv(x), (1, 2), value=0.7),
        lambda s, x: s.conv(x).clamp(min=torch.tensor(0.5)),
        lambda s, x: s.conv(x) * F.relu6(s.conv2(x) + 3) / 6,  # gated by something else
        lambda s, x: torch.add(s.conv(x), s.conv2(x), alpha=0.5),
        lambda s, x: torch.sub(s.conv(x), s.conv2(x), alpha=2),
        lambda s, x: torch.div(s.conv(x), 0.3, rounding_mode="floor"),
        lambda s, x: 1 - s.conv(x),
        lambda s, x: 2 / (s.conv(x).exp() + 1),
        lambda s, x: s.scale - s.conv(x),
        lambda s, x: s.scale / (s.conv(x).exp() + 1),
        lambda s, x: s.scale * s.conv(x),
        lambda s, x: s.conv(x) ** 2 + (-s.conv2(x)).abs(),
        lambda s, x: torch.mul(input=s.conv(x), other=s.conv2(x)),
        lambda s, x: torch.cat(tensors=[s.conv(x), s.conv2(x)], dim=-3),
        lambda s, x: torch.concat((s.conv(x), s.conv2(x)), axis=1),  # pyright: ignore[reportCallIssue]
        lambda s, x: s.conv(x).mean([-1, -2]),
        lambda s, x: s.conv(x).mean(dim=1, keepdim=True),
        lambda s, x: torch.mean(s.conv(x), (2, 3), True),
        lambda s, x: s.conv(x).flatten(-2).mT,
        lambda s, x: s.conv(input=x).transpose(dim0=-1, dim1=1),
        lambda s, x: torch.permute(s.conv(x), (0, 3, 1, 2)),
        lambda s, x: s.conv(x).permute(dims=(0, -1, 1, 2)),
        lambda s, x: (s.conv(x) > 0).float() * 2,
        lambda s, x: s.conv(x).float().to(x.dtype).type_as(x).to(x.device),
        lambda s, x: torch.stack([s.conv(x), s.conv2(x)], 2),
    ],
)
def test_what_has_no_module_keeps_its_meaning(function) -> None:
    model = Forward(function, conv=conv(), conv2=conv(), scale=nn.Parameter(torch.randn(4, 1, 1)))
    gm = traced(randomise(model), IMAGE)
    assert "ReLU" not in kinds(gm)


def test_arguments_of_functions_are_plain() -> None:
    def function(self, x):
        y = torch.cat([self.conv(x), x[:, :, 1:-1, 1:-1]], dim=-3)
        return (
            y.mean(dim=(-1, 2)),
            torch.flatten(y, -3),
            y.permute((0, -2, 3, 1)),
            y.transpose(-1, 1),
        )

    gm = traced(randomise(Forward(function, conv=conv())), IMAGE)
    args = {
        getattr(n.target, "__name__", n.target): n.args[1:]
        for n in gm.graph.nodes
        if n.op in ("call_function", "call_method") and n.target is not operator.getitem
    }
    assert args == {
        "cat": (1,),
        "mean": ((2, 3), False),
        "flatten": (1, 3),
        "permute": (0, 2, 3, 1),
        "transpose": (3, 1),
    }
    assert all(not n.kwargs for n in gm.graph.nodes)
