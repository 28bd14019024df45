"""Boxes in [0, 640] and scores near [0, 1] in one tensor: what one int8 range does to the scores, and a split head not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rewriter import Plan, profile, quantize, rewrite, target, trace
from rewriter.graph.lookup import outputs
from rewriter.int8.annotate import annotation
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.lint import lint
from rewriter.int8.onnx.session import Session

BOXES, SCORES = slice(0, 4), slice(4, 7)


class ToyDetector(nn.Module):
    """One 1 x 1 head; weights and inputs lie on their int8 grids, so that only the output is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(7, 7, 1)
        scale = torch.tensor([640.0] * 4 + [1.0] * 3)
        self.head.weight = nn.Parameter(torch.diag(scale).view(7, 7, 1, 1))
        self.head.bias = nn.Parameter(torch.tensor([0.0] * 4 + [0.137] * 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


@pytest.fixture
def pixels() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (6, 7, 9, 11), generator=g) / 255
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.0, 1.0  # both ends of the range occur
    return x


def run(plan: str, x: torch.Tensor):
    gm = trace(ToyDetector().eval(), x[:2])
    profile(gm, [x])
    quantized = quantize(rewrite(gm, Plan.parse(plan)), target("onnxruntime"), [x])
    model = to_onnx(quantized)
    with torch.no_grad():
        expected = gm(x).numpy()
    return expected, Session(model).run(x)[0], quantized, model


def test_one_range_for_all_leaves_nothing_of_the_scores(pixels):
    expected, found, _, _ = run("", pixels)
    assert expected[:, SCORES].max() > 1
    assert np.all(found[:, SCORES] == 0)


def test_a_split_head_keeps_the_scores_to_half_a_step(pixels):
    expected, found, quantized, model = run("split_head_2@head", pixels)
    steps = sorted(
        quantized.value_params(n)[0]
        for n in quantized.gm.graph.nodes
        if n.op == "call_module" and annotation(n).output is not None
    )
    assert len(steps) == 2
    assert np.abs(found - expected)[:, SCORES].max() <= 0.501 * steps[0]
    assert np.abs(found - expected)[:, BOXES].max() <= 0.501 * steps[1]
    assert steps[0] < 0.01 < steps[1]
    assert all(annotation(n).output is None for n in outputs(quantized.gm))  # joined in float
    assert not [f for f in lint(quantized, model) if f.code == "merged_range"]
