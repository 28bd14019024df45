"""What torch's exporter cannot write runs from plain operations, and computes what torch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d

from rewriter.errors import QuantizeError
from rewriter.int8.onnx.export import float_onnx
from rewriter.int8.onnx.session import Session
from rewriter.tracing.trace import trace
from tests.networks import Forward, conv, randomise

F = nn.functional
IMAGE = (3, 13, 10)


def runs(model: nn.Module, x: Tensor | None = None) -> None:
    """The float file gives what torch gives, for one input and for several."""
    x = torch.randn(4, *IMAGE) if x is None else x
    gm = trace(model.eval(), x[:2])
    session = Session(float_onnx(gm))
    for n in (1, 3):
        with torch.no_grad():
            expected = model(x[:n])
        (found,) = session.run(x[:n])
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=2e-4, atol=2e-5)


def resized(**given: Any) -> nn.Module:
    return Forward(lambda m, x: F.interpolate(x, **given))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "size", [{"size": (5, 7)}, {"scale_factor": 0.45}, {"scale_factor": (0.5, 1.7)}], ids=str
)
def test_antialiased_resize(mode: str, size: dict[str, Any]) -> None:
    runs(resized(mode=mode, antialias=True, **size))


def test_resize_by_area_and_uneven_pools() -> None:
    runs(resized(size=(4, 7), mode="area"))
    runs(nn.AdaptiveAvgPool2d((4, 7)))
    runs(nn.AdaptiveMaxPool2d((4, 7)))
    runs(nn.AdaptiveMaxPool2d((17, 3)))


@pytest.mark.parametrize(
    "norm",
    [
        lambda m, x: m.norm(x.permute(0, 2, 3, 1)),
        lambda m, x: F.rms_norm(x, (13, 10), eps=1e-3),
        lambda m, x: F.rms_norm(x.permute(0, 2, 3, 1), (3,), weight=m.norm.weight),
    ],
)
def test_root_mean_square_norm(norm: Callable[..., Tensor]) -> None:
    layer = nn.RMSNorm(3)
    nn.init.uniform_(layer.weight)
    runs(Forward(norm, norm=layer))


def test_bilinear_layer() -> None:
    runs(Forward(lambda m, x: m.b(x.mean((2, 3)), x.amax((2, 3))), b=nn.Bilinear(3, 3, 5)))


@pytest.mark.parametrize("corners", [True, False])
def test_affine_grid(corners: bool) -> None:
    def warp(m: Forward, x: Tensor) -> Tensor:
        theta = torch.tanh(m.fc(x.mean((2, 3)))).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=corners)
        return F.grid_sample(x, grid, align_corners=corners)

    runs(Forward(warp, fc=nn.Linear(3, 6)))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("each", [True, False])
def test_kernels_computed_from_the_input(kernel: int, each: bool) -> None:
    """Depthwise and dense: one set of filters for each image, as a convolution in groups over the batch."""

    def convolve(m: Forward, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        filters = m.fc(x.mean((2, 3)))
        shape = (n * c, 1) if each else (n * 4, c)
        groups = n * c if each else n
        y = F.conv2d(
            x.reshape(1, n * c, h, w),
            filters.view(*shape, kernel, kernel),
            padding=kernel // 2,
            groups=groups,
        )
        return y.view(n, 3 if each else 4, h, w)

    outs = (3 if each else 12) * kernel**2
    runs(Forward(convolve, fc=nn.Linear(3, outs)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"groups": 2}, {"bias": False}],
    ids=str,
)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_deformable_convolution(settings: dict[str, Any], masked: bool, parts: int) -> None:
    given = {"padding": 1, **settings}
    place = {k: v for k, v in given.items() if k not in ("groups", "bias")}

    def convolve(m: Forward, x: Tensor) -> Tensor:
        y = m.stem(x)
        mask = torch.sigmoid(m.mask(y)) if masked else None
        return m.deform(y, 2.5 * m.offset(y), mask)

    torch.manual_seed(0)
    model = Forward(
        convolve,
        stem=conv(3, 4, 1),
        offset=conv(4, 18 * parts, 3, **place),
        mask=conv(4, 9 * parts, 3, **place),
        deform=DeformConv2d(4, 6, 3, **given),
    )
    runs(randomise(model))


def test_deformable_convolution_by_the_function() -> None:
    def convolve(m: Forward, x: Tensor) -> Tensor:
        # an int works too, whatever the annotation says
        return deform_conv2d(
            x,
            m.offset(x),
            m.conv.weight,
            m.conv.bias,
            padding=1,  # pyright: ignore[reportArgumentType]
        )

    runs(Forward(convolve, conv=conv(3, 5, 3), offset=conv(3, 18, 3, padding=1)))


def test_a_deformable_convolution_is_named_as_a_part_in_float() -> None:
    model = Forward(
        lambda m, x: m.deform(x, m.offset(x)),
        offset=conv(3, 18, 3, padding=1),
        deform=DeformConv2d(3, 4, 3, padding=1),
    )
    gm = trace(model.eval(), torch.randn(2, *IMAGE))
    assert [(o.name, o.kind) for o in gm.meta["opaque"]] == [("deform", "DeformConv2d")]


def test_what_nobody_can_write_is_named_and_nothing_is_dumped(
    capfd: pytest.CaptureFixture[str],
) -> None:
    gm = trace(
        Forward(lambda m, x: torch.fft.rfft2(m.conv(x)).abs(), conv=conv()).eval(),
        torch.randn(2, *IMAGE),
    )
    with pytest.raises(QuantizeError, match="fft_rfft2: cannot be written to ONNX"):
        float_onnx(gm)
    said = capfd.readouterr()
    assert said.out == said.err == ""
