"""What moves to a GPU gives there what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from rewriter.graph.interpret import device_of
from rewriter.int8.annotate import annotation
from rewriter.int8.scheme import target
from rewriter.int8.simulate import quantize, simulate
from rewriter.sensitivity import analyze
from rewriter.tracing.trace import trace
from tests.sensitivity.planted import healthy, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_calibration() -> None:
    gm = trace(healthy(), inputs(2))
    scheme = target("onnxruntime")
    here = quantize(gm, scheme, [inputs(16)]).calibration
    there = quantize(gm.to("cuda"), scheme, [inputs(16)]).calibration
    assert device_of(gm).type == "cuda"
    for name, (low, high) in here.values.items():
        assert there.values[name] == pytest.approx((low, high), rel=1e-4, abs=1e-5)
    assert all(s.channel_low.device.type == "cpu" for s in there.stats.values())


@pytest.mark.parametrize("kernels", [False, True])
def test_simulation(kernels: bool) -> None:
    gm = trace(healthy(), inputs(2))
    simulated = simulate(quantize(gm, target("per_tensor"), [inputs(16)]), kernels=kernels)
    x = inputs(8, seed=2)
    with torch.no_grad():
        here = simulated(x)
        there = simulated.to("cuda")(x.cuda()).cpu()
    step = max(float(here.max() - here.min()) / 255, 1e-6)
    assert float((here - there).abs().max()) <= 4 * step  # ties may fall to the other side


@pytest.mark.parametrize("exact", [False, True])
def test_analysis(exact: bool) -> None:
    y = torch.arange(48) % 10
    found = []
    for device in ("cpu", "cuda"):
        gm = trace(healthy(), inputs(2)).to(device)
        found.append(
            analyze(
                gm,
                target("per_tensor"),
                [inputs(16, 2)],
                inputs(),
                targets=y,
                metric=lambda outputs, targets: outputs[0].argmax(1) == targets,
                exact=exact,
                top=3,
            )
        )
        assert device_of(gm).type == device
        assert all(annotation(n) is not None for n in gm.graph.nodes)
    here, there = found
    assert [r.layer for r in here.layers[:3]] == [r.layer for r in there.layers[:3]]
    expected = {r.layer: r.damage for r in here.layers}
    for r in there.layers:
        assert r.damage == pytest.approx(expected[r.layer], rel=0.05)
    assert [r.causes for r in here.layers[:3]] == [r.causes for r in there.layers[:3]]
