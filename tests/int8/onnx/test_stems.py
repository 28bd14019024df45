"""The first convolution over blocks of 2 x 2 places: the same products, to the last bit, wherever it is done."""

from __future__ import annotations

import itertools

import onnx
import pytest
import torch
from torch import Tensor, nn

from rewriter import quantize, simulate, target, trace
from rewriter.int8.onnx import stems
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.session import Session
from rewriter.int8.onnx.stems import MOST_CHANNELS, blocked

FORMS = [
    (kernel, padding, size)
    for kernel, padding, size in itertools.product(
        [(3, 3), (2, 2), (7, 7), (5, 3), (1, 4)], [(0, 0), (1, 1), (3, 2)], [(12, 16), (20, 18)]
    )
]


def file_of(
    model: nn.Module, x: Tensor, scheme: str = "onnxruntime"
) -> tuple[onnx.ModelProto, list[str], Tensor]:
    quantized = quantize(trace(model.eval(), x[:2]), target(scheme), [x])
    with torch.no_grad():
        expected = simulate(quantized, kernels=True)(x)
    file = to_onnx(quantized)
    return file, [n.op_type for n in file.graph.node], expected


@pytest.mark.parametrize(("kernel", "padding", "size"), FORMS)
def test_blocked_weights_compute_the_same_convolution(
    kernel: tuple[int, int], padding: tuple[int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, kernel, 2, padding).double()
    x = torch.randn(2, 3, *size).double()
    weight = blocked(conv.weight.detach(), list(padding))
    phases = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
    before = [-(-p // 2) for p in padding]
    wide = nn.functional.pad(phases, (before[1], 9, before[0], 9))
    with torch.no_grad():
        expected = conv(x)
        found = nn.functional.conv2d(wide, weight, conv.bias)
    rows, columns = expected.shape[2:]
    torch.testing.assert_close(found[:, :, :rows, :columns], expected)


@pytest.mark.parametrize("scheme", ["onnxruntime", "per_tensor"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "padding"), [(3, 1), (3, 0), (7, 3), (5, 2), (2, 0), ((3, 5), (0, 2))]
)
def test_the_file_computes_what_the_simulation_does(
    kernel: int | tuple[int, int], padding: int | tuple[int, int], bias: bool, scheme: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 20)
    model = nn.Sequential(
        nn.Conv2d(3, 8, kernel, 2, padding, bias=bias), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    file, kinds, expected = file_of(model, x, scheme)
    assert "SpaceToDepth" in kinds
    onnx.checker.check_model(file, full_check=True)
    for optimize in (True, False):
        found = torch.from_numpy(Session(file, threads=1, optimize=optimize).run(x)[0])
        assert float(((found - expected).abs() > 1e-6).float().mean()) < 0.002


def test_a_pad_before_it_is_part_of_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 20)
    model = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2), nn.ReLU())
    file, kinds, expected = file_of(nn.Sequential(*model, nn.Conv2d(8, 4, 1)), x)
    assert "SpaceToDepth" in kinds
    assert "Pad" not in kinds
    found = torch.from_numpy(Session(file, threads=1).run(x)[0])
    assert float(((found - expected).abs() > 1e-6).float().mean()) < 0.002


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (nn.Conv2d(MOST_CHANNELS + 1, 8, 3, 2, 1), 16),
        (nn.Conv2d(3, 8, 3, 1, 1), 16),
        (nn.Conv2d(3, 8, 3, 2, 1, dilation=2), 16),
        (nn.Conv2d(3, 6, 3, 2, 1, groups=3), 16),
        (nn.Conv2d(3, 8, 1, 2), 16),
        (nn.Conv2d(3, 8, 3, 2, 1), 15),
        (nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect"), 16),
    ],
)
def test_where_it_does_not_apply_the_convolution_is_written_as_it_is(
    conv: nn.Conv2d, size: int
) -> None:
    x = torch.randn(2, conv.in_channels, size, size)
    _, kinds, _ = file_of(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(conv.out_channels, 4, 1)), x)
    assert "SpaceToDepth" not in kinds


@pytest.mark.parametrize("scheme", ["openvino", "tensorrt", "qnn"])
def test_other_runtimes_get_the_convolution(scheme: str) -> None:
    x = torch.randn(2, 3, 16, 16)
    quantized = quantize(
        trace(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1)).eval(), x), target(scheme), [x]
    )
    assert "SpaceToDepth" not in [n.op_type for n in to_onnx(quantized).graph.node]


def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With phases in another order the file computes something else."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 20)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def wrong(weight: Tensor, begin: list[int]) -> Tensor:
        return blocked(weight, begin).roll(3, 1)

    monkeypatch.setattr(stems, "blocked", wrong)
    file, _, expected = file_of(model, x)
    found = torch.from_numpy(Session(file, threads=1).run(x)[0])
    assert float(((found - expected).abs() > 1e-6).float().mean()) > 0.1
