"""Every operator that is written to ONNX, run by ONNX Runtime, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter import QuantizeError, trace
from rewriter.int8.onnx.builder import Emission
from rewriter.int8.onnx.export import float_onnx
from rewriter.int8.onnx.session import Session

IMAGE = (6, 11, 8)  # odd and not square


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.tensor([2, 0, 3]))
        self.register_buffer("gain", torch.linspace(-0.7, 1.9, 6).view(6, 1, 1))

    def forward(self, *x: Tensor) -> Any:
        return self.function(self, *x)


def check(model: nn.Module, *shapes: tuple[int, ...], opaque: bool = False) -> onnx.ModelProto:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.3, 2)
        for p in module.parameters(recurse=False):
            nn.init.uniform_(p, -0.7, 0.9)
    gm = trace(model.eval(), tuple(torch.randn(2, *s) for s in shapes))
    emitted = float_onnx(gm)
    onnx.checker.check_model(emitted, full_check=True)
    parts = [n for n in emitted.graph.node if ".part/" in "".join(n.output)]
    assert bool(parts) == opaque, "torch's exporter was asked" if parts else "it was not asked"
    for optimize in (False, True):
        session = Session(emitted, threads=1, optimize=optimize)
        for batch in (1, 3):
            inputs = [torch.randn(batch, *s) * 2 for s in shapes]
            with torch.no_grad():
                expected = model(*inputs)
            expected = expected if isinstance(expected, (tuple, list)) else (expected,)
            found = session.run(*inputs)
            assert len(found) == len(expected)
            for a, b in zip(expected, found, strict=True):
                assert a.shape == b.shape
                assert a.numpy().dtype == b.dtype
                largest = float(a.abs().max()) if a.is_floating_point() else 1.0
                np.testing.assert_allclose(b, a.numpy(), rtol=1e-4, atol=2e-5 * max(largest, 1e-3))
    return emitted


CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), bias=False), IMAGE),
    (nn.Conv2d(6, 12, 3, 1, 2, dilation=(2, 1), groups=6), IMAGE),
    (nn.Conv2d(6, 9, (1, 3), 2, padding=(0, 1), groups=3), IMAGE),
    (nn.Conv2d(6, 4, (4, 3), padding="same", dilation=2), IMAGE),
    (nn.Conv2d(6, 4, 3, padding="valid"), IMAGE),
    (nn.Conv2d(6, 4, 3, padding=(2, 1), padding_mode="reflect"), IMAGE),
    (nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode="circular"), IMAGE),
    (nn.Conv2d(6, 4, (3, 5), padding=(1, 2), padding_mode="replicate"), IMAGE),
    (nn.Conv1d(5, 7, 4, 2, 3, dilation=2), (5, 17)),
    (nn.Conv1d(6, 4, 3, padding="same", groups=2), (6, 17)),
    (nn.ConvTranspose2d(6, 4, (3, 2), (2, 3), (1, 0), (1, 2), bias=False), IMAGE),
    (nn.ConvTranspose2d(6, 9, 3, 2, 1, 1, groups=3, dilation=2), IMAGE),
    (nn.Linear(8, 5), IMAGE),
    (nn.Linear(8, 5, bias=False), (8,)),
    (nn.Linear(9, 4), (9,)),
    (nn.BatchNorm2d(6), IMAGE),
    (nn.BatchNorm2d(6, affine=False), IMAGE),
    (nn.BatchNorm1d(6), (6, 7)),
    (nn.LayerNorm([11, 8], eps=1e-3), IMAGE),
    (nn.LayerNorm(8, elementwise_affine=False), IMAGE),
    (nn.LayerNorm(8, bias=False), IMAGE),
    (nn.Sequential(nn.ZeroPad2d((0, 1, 2, 3)), nn.Conv2d(6, 4, 3, 2, 1)), IMAGE),
    (nn.Sequential(nn.ZeroPad2d((-1, 1, 2, -3)), nn.Conv2d(6, 4, 3)), IMAGE),
    (nn.Sequential(nn.ZeroPad2d((1, 2, 0, 3)), nn.AvgPool2d(3)), IMAGE),
]
ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.Hardtanh(-0.3, 1.7),
    nn.LeakyReLU(0.13),
    nn.PReLU(),
    nn.PReLU(6),
    nn.SiLU(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.ELU(0.7),
    nn.Mish(),
    nn.Softplus(),
    nn.Softplus(beta=2.5),
    nn.Softmax(dim=-1),
    nn.Softmax(dim=1),
]
POOLS = [
    nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.MaxPool2d(3, 1, 1, dilation=2),
    nn.AvgPool2d((3, 2), (2, 3), (1, 0)),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d(2, 2, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d((11, 2)),
    nn.AdaptiveAvgPool2d((4, 3)),
    nn.AdaptiveAvgPool2d((None, 4)),
    nn.AdaptiveMaxPool2d(1),
    nn.AdaptiveMaxPool2d((1, 4)),
    nn.Upsample(scale_factor=2),
    nn.Upsample(scale_factor=(1.7, 2.3)),
    nn.Upsample(size=(7, 19)),
    nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.Upsample(scale_factor=(1.5, 2.6), mode="bilinear"),
    nn.Upsample(scale_factor=(1.5, 2.6), mode="bilinear", recompute_scale_factor=True),
    nn.Upsample(size=(22, 17), mode="bilinear", align_corners=True),
    nn.Upsample(size=(1, 5), mode="bilinear"),
    nn.Upsample(scale_factor=2, mode="bicubic"),
    nn.Upsample(size=(7, 19), mode="nearest-exact"),
    nn.PixelShuffle(1),
    nn.ChannelShuffle(3),
    nn.ZeroPad2d((1, 2, 0, 3)),
]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "arithmetic": lambda m, x: (x + 1.5) * 0.5 - 2 / (x * x + 1) + (3 - x) ** 2,
    "constant": lambda m, x: x * m.gain + m.gain,
    "alpha": lambda m, x: torch.add(x, x.abs(), alpha=0.3),
    "unary": lambda m, x: x.exp() + x.sin().cos() - torch.sqrt(x.abs() + 1) + torch.erf(-x),
    "log": lambda m, x: torch.log(x.square() + 0.1).reciprocal().sign() + torch.rsqrt(x.abs() + 1),
    "rounding": lambda m, x: x.floor() + torch.ceil(x) + torch.round(x),
    "clamp": lambda m, x: (x.clamp(min=-0.5), x.clamp_max(0.25), torch.clamp(x, -1, 0.5)),
    "comparison": lambda m, x: torch.where((x > 0.3) & (x <= 1), x, x * 0.1) + (x != 0).float(),
    "extreme": lambda m, x: torch.maximum(x, m.gain) - torch.min(x, m.gain) + x.amax((2, 3), True),
    "extreme of a dimension": lambda m, x: (*x.max(2), x.min(-1, keepdim=True)[0], x.argmax(1)),
    "topk": lambda m, x: tuple(x.topk(3, dim=1)),
    "mean of places": lambda m, x: (x.mean((2, 3)), x.mean([-1, -2], keepdim=True), x.mean(1)),
    "sum": lambda m, x: (x.sum(1, keepdim=True), x.sum((1, 2)), x.amin(3)),
    "softmax": lambda m, x: x.log_softmax(1) + functional.softmax(x, dim=-1),
    "flatten": lambda m, x: (x.flatten(1), x.flatten(2), x.flatten(1, 2), torch.flatten(x)),
    "reshape": lambda m, x: x.view(x.shape[0], 3, 2, -1).permute(0, 3, 1, 2).reshape(-1, 6),
    "transpose": lambda m, x: (x.transpose(1, -1), x.flatten(2).swapaxes(-1, 1), x.mT),
    "slices": lambda m, x: (
        x[:, 1:5:2],
        x[..., 3],
        x[:, :, -4:-1, None],
        x[:, -2],
        x[:, None, 2:],
    ),
    "table": lambda m, x: (x[:, m.table], torch.index_select(x, 3, m.table), x[:, :, m.table]),
    "parts": lambda m, x: (*x.chunk(2, 1), *torch.split(x, [1, 4, 1], 1), *x.unbind(1)[2:4]),
    "cat": lambda m, x: torch.cat([x, x[:, :2] * 2, x], dim=1),
    "stack": lambda m, x: torch.stack([x, -x], dim=2),
    "dimensions": lambda m, x: x.unsqueeze(-1).unsqueeze(1).squeeze(1).squeeze(-1),
    "expand": lambda m, x: (
        x[:, :1].expand(-1, 4, -1, -1),
        x[:, :1].expand(x.shape[0], 4, 11, 8),
        m.gain.expand_as(x),
        x.repeat(1, 2, 1, 3),
    ),
    "pad": lambda m, x: (
        functional.pad(x, (1, 2), value=0.7),
        functional.pad(x, (1, 2, 3, 0, 2, 1)),
        functional.pad(x, (2, 1, 0, 3), mode="reflect"),
        functional.pad(x, (2, 1, 0, 3), mode="replicate"),
    ),
    "matmul": lambda m, x: (x @ x.transpose(2, 3)) @ m.gain.view(1, 6, 1, 1).expand(1, 6, 11, 11),
    "einsum": lambda m, x: torch.einsum("b c h w, b c h v -> b h w v", x, x),
    "attention": lambda m, x: functional.scaled_dot_product_attention(x, x * 0.5, x + 1),
    "gather": lambda m, x: x.gather(1, x.argmax(1, keepdim=True)),
    "integers": lambda m, x: (x.argmax(1) + 1) / 2 + x.argmax(1).float() * (x.argmax(1) > 2),
    "boxes": lambda m, x: torch.cat(
        [(x[:, 0:2].sigmoid() * 2 - 0.5) * 32, (x[:, 2:4].sigmoid() * 2).pow(2) * 7, x[:, 4:]], 1
    ),
}


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS, ids=lambda v: repr(v)[:60])
def test_layers(module: nn.Module, shape: tuple[int, ...]) -> None:
    check(module, shape)


@pytest.mark.parametrize("module", ACTIVATIONS, ids=repr)
def test_activations(module: nn.Module) -> None:
    check(module, IMAGE)


@pytest.mark.parametrize("module", POOLS, ids=repr)
def test_pools_and_resizing(module: nn.Module) -> None:
    check(module, IMAGE)


def test_pixel_shuffle() -> None:
    check(nn.PixelShuffle(2), (12, 5, 3))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    check(Call(FUNCTIONS[name]), IMAGE)


def test_several_inputs_and_outputs_in_the_order_of_the_user() -> None:
    model = Call(lambda m, a, b: {"second": b - 1, "first": [a * 2, a]})
    gm = trace(model, (torch.randn(2, 3), torch.randn(2, 5)))
    a, b = torch.randn(4, 3), torch.randn(4, 5)
    found = Session(float_onnx(gm)).run(a, b)
    for x, y in zip((b - 1, a * 2, a), found, strict=True):
        np.testing.assert_allclose(y, x.numpy(), rtol=1e-6)


def test_a_value_returned_twice_has_two_outputs() -> None:
    found = Session(float_onnx(trace(Call(lambda m, x: (x + 1, x + 1, x)), torch.randn(2, 3))))
    assert len(found.outputs) == len(set(found.outputs)) == 3


class Attentive(nn.Module):
    """Has parts that no emitter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(7, 7)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return self.head(y), y.transpose(1, 2)


def test_an_opaque_part_is_exported_by_torch_and_keeps_the_batch_free() -> None:
    check(Attentive(), (7, 8), opaque=True)


def test_a_function_without_an_emitter_is_exported_by_torch() -> None:
    check(Call(lambda m, x: x.cumsum(1) + torch.roll(x, 1, 2)), IMAGE, opaque=True)


def test_a_part_that_cannot_be_exported_is_named() -> None:
    gm = trace(Call(lambda m, x: torch.linalg.svdvals(x + 1)), torch.randn(2, 4, 3))
    with pytest.raises(QuantizeError, match=r"linalg_svdvals.* cannot be written to ONNX"):
        float_onnx(gm)


def test_the_same_opaque_part_is_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter.int8.onnx import opaque as onnx_opaque

    onnx_opaque._CACHE.clear()
    gm = trace(Attentive().eval(), torch.randn(2, 7, 8))
    first = float_onnx(gm)

    asked: list[int] = []

    def forbidden(*_: Any, **__: Any) -> None:
        asked.append(1)
        raise AssertionError("exported again")

    monkeypatch.setattr(torch.onnx, "export", forbidden)
    assert float_onnx(gm) == first
    assert not asked
    gm.norm.weight[0] += 1
    with pytest.raises(QuantizeError, match="cannot be written to ONNX"):
        float_onnx(gm)
    assert asked


def test_dynamic_batch_and_names() -> None:
    emitted = float_onnx(trace(nn.Conv2d(6, 4, 3), torch.randn(2, *IMAGE)))
    (given,), (made,) = emitted.graph.input, emitted.graph.output
    sizes = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (given, made)
    ]
    assert sizes == [["batch", 6, 11, 8], ["batch", 4, 9, 6]]


FAULTS: list[tuple[nn.Module, tuple[int, ...], str, Any]] = [
    (nn.ReLU6(), IMAGE, "scalar", lambda t: t * 0.98),
    (nn.Conv2d(6, 6, 3, padding=1), IMAGE, "weight", lambda t: t.transpose(1, 0, 2, 3)),
    (nn.Linear(9, 4), (9,), "bias", lambda t: t * 0),
    (nn.AdaptiveAvgPool2d((4, 3)), IMAGE, "rows", lambda t: t[::-1]),
]


@pytest.mark.parametrize(
    ("module", "shape", "constant", "fault"),
    FAULTS,
    ids=lambda v: None if callable(v) and not isinstance(v, nn.Module) else repr(v),
)
def test_a_planted_fault_fails_the_comparison(
    module: nn.Module,
    shape: tuple[int, ...],
    constant: str,
    fault: Callable[[np.ndarray], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Emission.constant

    def faulty(self: Emission, value: Any, label: str) -> str:
        array = value.detach().numpy() if isinstance(value, Tensor) else value
        return store(
            self, np.ascontiguousarray(fault(array)) if label == constant else array, label
        )

    monkeypatch.setattr(Emission, "constant", faulty)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(module, shape)
