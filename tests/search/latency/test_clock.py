from __future__ import annotations

import pytest
import torch
from torch import nn

from rewriter import quantize, target, trace
from rewriter.int8.onnx import Kernel, Profile, float_onnx, to_onnx
from search.latency.clock import (
    AS_FAST,
    CHOSEN,
    DEPTHWISE,
    FLOAT,
    GATES,
    IN_FLOAT,
    LARGE,
    PLAIN,
    Time,
    clocked,
    time_shares,
    verdict,
)


def times(original: float, plain: float, chosen: float) -> dict[str, Time]:
    found = {FLOAT: original, PLAIN: plain, CHOSEN: chosen}
    return {name: Time(ms, ms, 1) for name, ms in found.items()}


def test_where_int8_wins_nothing_else_is_said() -> None:
    said = verdict(times(10.0, 6.0, 6.3), {GATES: 0.9})
    assert said == (
        "The chosen file takes 6.3 ms on one thread, plain int8 6 (1.05x) and float 10 (0.63x)."
    )


@pytest.mark.parametrize(
    ("chosen", "word"), [(10.0 * AS_FAST * 0.99, "no faster"), (10.0 * AS_FAST * 1.01, "slower")]
)
def test_where_it_does_not_what_takes_the_time_is_named(chosen: float, word: str) -> None:
    said = verdict(times(10.0, 11.0, chosen), {GATES: LARGE, DEPTHWISE: LARGE - 0.01})
    assert f"int8 is {word} than float" in said
    assert "replace_activation_relu" in said
    assert "densify_depthwise" not in said
    assert "max_latency_ratio" not in said
    assert "max_latency_ratio" in verdict(times(10.0, 7.0, 12.0), {IN_FLOAT: 0.5})


def test_shares_of_the_time() -> None:
    def kernel(operator: str, macs: int = 0, attributes: str = "", floats: bool = False) -> Kernel:
        return Kernel("n", operator, f"{operator} x {attributes}", macs, 1, floats)

    kernels = (
        kernel("QLinearConv", 10, "group=1"),
        kernel("QLinearConv", 10, "group=16"),
        kernel("QLinearMul"),
        kernel("Softmax", floats=True),
        kernel("DequantizeLinear"),
        kernel("Transpose"),
    )
    found = time_shares(Profile(kernels, (4.0, 2.0, 1.0, 1.0, 1.0, 1.0), 10.0))
    assert found == {
        "convolutions": 0.4,
        DEPTHWISE: 0.2,
        IN_FLOAT: 0.2,
        GATES: 0.1,
        "changes of layout": 0.1,
    }


def test_three_files_side_by_side() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 16, 16)
    gm = trace(model, x)
    int8 = to_onnx(quantize(gm, target("onnxruntime"), [x])).SerializeToString()
    files = {FLOAT: float_onnx(gm).SerializeToString(), PLAIN: int8, CHOSEN: int8}
    found = clocked(files, x[:1], threads=1)
    assert set(found.times) == set(files)
    assert all(t.one_ms > 0 and t.one_ms == t.all_ms for t in found.times.values())
    assert [t.bytes for t in found.times.values()] == [len(c) for c in files.values()]
    assert sum(found.shares.values()) == pytest.approx(1, abs=0.001)
    assert found.to_dict()["times"][FLOAT]["bytes"] == len(files[FLOAT])
