"""What cannot become an int8 file is said before anything is searched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewriter import target, trace
from search.config.schema import ConfigError
from search.scoring import trial
from tests.networks import SIZE, Forward, conv, randomise

IMAGES = torch.randn(3, *SIZE)


def plain() -> nn.Module:
    return randomise(nn.Sequential(conv(), nn.ReLU(), conv(4, 5)))


def test_a_network_is_tried_and_left_as_it_was() -> None:
    gm = trace(plain(), IMAGES[:2])
    keys = [set(n.meta) for n in gm.graph.nodes]
    trial.try_file(gm, target("onnxruntime"), IMAGES)
    assert [set(n.meta) for n in gm.graph.nodes] == keys


def test_a_part_without_a_form_is_named() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.rfft2(x).abs()

    model = Forward(lambda m, x: m.spectrum(m.conv(x)), conv=conv(), spectrum=Spectrum())
    gm = trace(model.eval(), IMAGES[:2])
    with pytest.raises(
        ConfigError, match=r"no int8 file: fft_rfft2 in spectrum: cannot .* ONNX"
    ) as e:
        trial.try_file(gm, target("onnxruntime"), IMAGES)
    assert trial.WAY_OUT in str(e.value)
    assert "\n" not in str(e.value)


def test_a_file_that_the_runtime_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def __init__(self, *args: object, **kwargs: object) -> None:
            raise RuntimeError("[ONNXRuntimeError]\nno kernel")

    monkeypatch.setattr(trial, "Session", Refuses)
    gm = trace(plain(), IMAGES[:2])
    with pytest.raises(ConfigError, match=r"ONNX Runtime refuses .* no kernel; engine: simulate"):
        trial.try_file(gm, target("onnxruntime"), IMAGES)
