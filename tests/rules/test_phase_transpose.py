from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewriter import Plan, cost, quantize, rewrite, target
from rewriter.int8.simulate import simulate
from rewriter.rules.phase_transpose import PhaseTranspose
from tests.rules import check

RULE = PhaseTranspose()
SHAPE = (4, 5, 7)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_function_is_kept(stride: int, bias: bool) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, stride, stride, bias=bias), nn.ReLU())
    new = check.rewrites(RULE, model, SHAPE)
    gm = check.graph_of(model, SHAPE)
    assert cost(new.float()).macs == cost(gm.float()).macs


def test_each_phase_has_a_scale_of_its_own() -> None:
    """Planted: one phase with weights a hundred times as large as those of the others."""
    model: Any = check.randomise(nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2, bias=False)))
    with torch.no_grad():
        model[0].weight[:, :, 0, 0] *= 100
    gm = check.graph_of(model, SHAPE, "onnxruntime").float()
    x = check.inputs(SHAPE, 8).float()
    found: list[float] = []
    for text in ("", "phase_transpose@_0"):
        q = quantize(rewrite(gm, Plan.parse(text)), target("onnxruntime"), [x])
        parts: list[Any] = list(simulate(q).modules())
        (layer,) = (m for m in parts if type(m).__name__ == "QuantizedLayer")
        missing = (layer.weight() - layer.layer.weight).abs()
        if not text:
            missing = missing.permute(1, 2, 3, 0)
        found.append(float(missing.reshape(6, 4, 4)[:, 1:].max()))  # by channel and phase
    assert found[1] < 0.05 * found[0]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose2d(4, 6, 3, 2), "overlap"),
        (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), "2 groups"),
        (nn.ConvTranspose2d(4, 6, (2, 3), (2, 3)), "its strides differ: 2 and 3"),
        (nn.ConvTranspose2d(4, 6, 2, 2, padding=1), "padded or dilated"),
    ],
)
def test_refuses(layer: nn.Module, reason: str) -> None:
    check.refuses(RULE, nn.Sequential(layer), reason, SHAPE)


def test_ignores_convolutions() -> None:
    check.ignores(RULE, nn.Sequential(nn.Conv2d(4, 4, 2, 2), nn.PixelShuffle(2)), SHAPE)
