"""What the table says of an operator, against what torch computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.graph.ops import OPERATORS, clip_bounds, fused_on, modules_by_call, row_of, types
from rewriter.int8.onnx.modules import MODULES
from rewriter.int8.scheme import TARGETS

MADE: dict[type[nn.Module], Any] = {
    nn.Hardtanh: lambda: nn.Hardtanh(-0.5, 0.75),
    nn.LeakyReLU: lambda: nn.LeakyReLU(0.2),
    nn.PReLU: lambda: nn.PReLU(6),
    nn.MaxPool2d: lambda: nn.MaxPool2d(3, 2),
    nn.AvgPool2d: lambda: nn.AvgPool2d(3, 2),
    nn.AdaptiveAvgPool2d: lambda: nn.AdaptiveAvgPool2d(2),
    nn.AdaptiveMaxPool2d: lambda: nn.AdaptiveMaxPool2d(2),
    nn.ZeroPad2d: lambda: nn.ZeroPad2d(1),
    nn.Upsample: lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.BatchNorm2d: lambda: nn.BatchNorm2d(6),
    nn.PixelShuffle: lambda: nn.PixelShuffle(1),
    nn.ChannelShuffle: lambda: nn.ChannelShuffle(3),
}


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = MADE.get(kind, kind)()
    if isinstance(module, nn.PReLU):
        nn.init.uniform_(module.weight, 0.1, 0.6)
    return module.eval()


def images() -> Tensor:
    return 3 * torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(1))


POINTWISE = types(lambda row: row.pointwise)


@pytest.mark.parametrize("kind", POINTWISE, ids=lambda k: k.__name__)
@torch.no_grad()
def test_a_pointwise_operator_reads_each_value_alone(kind: type[nn.Module]) -> None:
    module, x = made(kind), images()
    y = module(x)
    changed = x.clone()
    changed[0, 2, 3, 4] += 1.5
    differs = module(changed) != y
    differs[0, 2, 3, 4] = False
    assert not differs.any()


@pytest.mark.parametrize(
    "kind", types(lambda row: row.pointwise or row.channelwise), ids=lambda k: k.__name__
)
@torch.no_grad()
def test_homogeneous_is_what_scales_with_its_input(kind: type[nn.Module]) -> None:
    module, x = made(kind), images()
    scaled = torch.allclose(module(2.5 * x), 2.5 * module(x), atol=1e-5)
    row = row_of(kind)
    assert row is not None
    # a batch norm without a shift scales too, but none has no shift
    assert scaled == row.homogeneous or row.norm


@pytest.mark.parametrize("kind", types(lambda row: row.channelwise), ids=lambda k: k.__name__)
@torch.no_grad()
def test_a_channelwise_operator_keeps_channels_apart(kind: type[nn.Module]) -> None:
    module, x = made(kind), images()
    y = module(x)
    x[:, 2] += 1.0
    differs = (module(x) != y).any(dim=(0, 2, 3))
    assert differs.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("kind", types(lambda row: row.clips), ids=lambda k: k.__name__)
@torch.no_grad()
def test_a_clip_is_a_clamp_to_its_bounds(kind: type[nn.Module]) -> None:
    module, x = made(kind), images()
    bounds = clip_bounds(module)
    assert bounds is not None
    assert torch.equal(module(x), x.clamp(*bounds))


@pytest.mark.parametrize("kind", types(lambda row: row.bounded), ids=lambda k: k.__name__)
@torch.no_grad()
def test_a_bounded_operator_stays_inside_one(kind: type[nn.Module]) -> None:
    assert made(kind)(100 * images()).abs().max() <= 1


@pytest.mark.parametrize(
    "kind", types(lambda row: row.moves and not row.layer), ids=lambda k: k.__name__
)
@torch.no_grad()
def test_what_moves_values_makes_none(kind: type[nn.Module]) -> None:
    x = images()
    known = torch.cat([x.flatten(), torch.zeros(1)])
    assert torch.isin(made(kind)(x), known).all()


def test_every_module_of_the_normal_form_can_be_written() -> None:
    assert set(types(lambda row: row.normal)) == set(MODULES)


def test_no_operator_has_two_rows() -> None:
    modules = [row.module for row in OPERATORS if row.module is not None]
    assert len(modules) == len(set(modules))
    named = [call for row in OPERATORS for call in set(row.calls)]
    assert len(named) == len(set(named))


def test_a_target_fuses_what_the_table_says() -> None:
    for name, scheme in TARGETS.items():
        known = {target for row in OPERATORS for target in row.fused_by}
        assert scheme.fuses == fused_on(name if name in known else "onnxruntime")
    assert fused_on("onnxruntime") == {nn.ReLU, nn.ReLU6, nn.Hardtanh}
    assert nn.SiLU in fused_on("tensorrt")
    assert nn.Softplus not in fused_on("tensorrt")


def test_a_function_with_a_module_becomes_that_module() -> None:
    assert modules_by_call()[torch.sigmoid] is nn.Sigmoid
    assert row_of(torch.sigmoid) is None
    assert row_of(nn.Sigmoid) is not None
