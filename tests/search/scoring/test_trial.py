"""What cannot become an int8 file is said before anything is searched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewriter import target, trace
from search.config.schema import ConfigError
from search.engines import OnnxRuntime
from search.scoring import trial
from tests.networks import SIZE, Forward, conv, randomise

SCHEME = target("onnxruntime")
IMAGES = torch.randn(3, *SIZE)


def plain() -> nn.Module:
    return randomise(nn.Sequential(conv(), nn.ReLU(), conv(4, 5)))


def test_a_network_is_tried_and_left_as_it_was() -> None:
    gm = trace(plain(), IMAGES[:2])
    keys = [set(n.meta) for n in gm.graph.nodes]
    done = trial.trial(gm, SCHEME, [IMAGES], OnnxRuntime())
    assert done.int8_share == 1.0
    assert [set(n.meta) for n in gm.graph.nodes] == keys


def test_a_part_without_a_form_is_named() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.rfft2(x).abs()

    model = Forward(lambda m, x: m.spectrum(m.conv(x)), conv=conv(), spectrum=Spectrum())
    gm = trace(model.eval(), IMAGES[:2])
    said = r"no int8 file: fft_rfft2 in spectrum: cannot .* ONNX"
    with pytest.raises(ConfigError, match=said) as e:
        trial.trial(gm, SCHEME, [IMAGES], OnnxRuntime())
    assert trial.WAY_OUT in str(e.value)
    assert "\n" not in str(e.value)


def test_a_file_that_the_runtime_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("[ONNXRuntimeError]\nno kernel")

    monkeypatch.setattr(OnnxRuntime, "open", refuse)
    gm = trace(plain(), IMAGES[:2])
    with pytest.raises(
        ConfigError, match=r"refuses the int8 file: .* no kernel; engine: simulate"
    ):
        trial.trial(gm, SCHEME, [IMAGES], OnnxRuntime())
