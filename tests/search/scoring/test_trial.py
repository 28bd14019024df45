"""What cannot become an int8 file is said before anything is searched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewriter import target, trace
from search.config.schema import ConfigError
from search.engines import OnnxRuntime
from search.scoring import trial
from tests.networks import SIZE, Forward, conv, network

IMAGES = torch.randn(3, *SIZE)


def test_a_network_is_tried_and_left_as_it_was() -> None:
    gm = trace(network(3), IMAGES[:2])
    keys = [set(n.meta) for n in gm.graph.nodes]
    trial.trial(gm, target("onnxruntime"), [IMAGES], OnnxRuntime())
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
        trial.trial(gm, target("onnxruntime"), [IMAGES], OnnxRuntime())
    assert trial.WAY_OUT in str(e.value)
    assert "\n" not in str(e.value)


def test_a_file_that_the_runtime_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[ONNXRuntimeError]\nno kernel")

    monkeypatch.setattr(OnnxRuntime, "open", refuses)
    gm = trace(network(3), IMAGES[:2])
    with pytest.raises(ConfigError, match=r"onnxruntime refuses .* no kernel; engine: simulate"):
        trial.trial(gm, target("onnxruntime"), [IMAGES], OnnxRuntime())
