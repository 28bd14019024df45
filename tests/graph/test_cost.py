from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from rewriter.graph import cost as module
from rewriter.graph.cost import cost, layer_macs
from rewriter.graph.lookup import kind_of, layers
from rewriter.plan import Plan, find_sites, rewrite
from rewriter.tracing.trace import trace
from tests.networks import SIZE, network, randomise, seeds

F = nn.functional

# layer, input shape, (multiply-accumulates by hand: output places x weights that each one needs)
CLOSED_FORMS = [
    (nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=1), (3, 9, 8), 8 * 5 * 6 * 3 * 15),
    (nn.Conv2d(6, 6, 3, groups=6, dilation=2), (6, 9, 8), 6 * 5 * 4 * 9),
    (nn.Conv2d(6, 4, 3, groups=2, bias=False), (6, 9, 8), 4 * 7 * 6 * 3 * 9),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 4), 4 * 5 * 4 * 3 * 9),
    (nn.Conv1d(3, 5, 4), (3, 12), 5 * 9 * 3 * 4),
    (nn.Linear(7, 5), (7,), 7 * 5),
    (nn.Linear(7, 5), (6, 7), 6 * 7 * 5),
]


@pytest.mark.parametrize(("layer", "shape", "macs"), CLOSED_FORMS)
def test_closed_forms(layer: Any, shape: tuple[int, ...], macs: int) -> None:
    gm = trace(layer, torch.randn(2, *shape))
    found = cost(gm)
    assert found.macs == macs
    assert list(layer_macs(gm).values()) == [macs]
    assert found.params == sum(p.numel() for p in layer.parameters())
    weights = layer.weight.numel()
    assert found.weight_bytes == weights + 4 * (found.params - weights)


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers(kind: type[nn.Module], gates: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(5, 4, num_layers=2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    steps = 6
    first = 2 * gates * (5 * 4 + 4 * 4)
    second = 2 * gates * (8 * 4 + 4 * 4)
    found = cost(trace(Net(), torch.randn(2, steps, 5)))
    assert found.macs == steps * (first + second + 8 * 3)
    assert found.weight_bytes == found.params * 4 - 3 * 24


def test_recurrent_layer_inside_an_opaque_part() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(5, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0] if x.sum() > -1e9 else x

    gm = trace(nn.Sequential(nn.Linear(5, 5), Inner()), torch.randn(2, 3, 5))
    assert [o.name for o in gm.meta["opaque"]] == ["1"]
    assert cost(gm).macs == 3 * (25 + 4 * (20 + 16))
    assert not gm.get_submodule("1").rnn._forward_hooks


def test_matrix_products_count_and_batch_norm_does_not() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.norm(x)).flatten(2)
            return y @ y.transpose(1, 2)

    assert cost(trace(randomise(Attention()), torch.randn(1, 4, 5, 6))).macs == 4 * 4 * 30


def test_keep_float_and_shared_weights_in_bytes() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    gm = trace(model, torch.randn(1, 6))
    assert cost(gm).weight_bytes == 72 + 4 * 12
    layers(gm)[0].meta["keep_float"] = True
    assert cost(gm).weight_bytes == 36 + 4 * 36 + 4 * 12
    model[2].weight = model[0].weight
    gm = trace(model, torch.randn(1, 6))
    assert (cost(gm).params, cost(gm).weight_bytes) == (48, 36 + 4 * 12)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_layers_add_up(seed: int) -> None:
    gm = trace(network(seed), torch.randn(2, *SIZE))
    assert sum(layer_macs(gm).values()) == cost(gm).macs


# ---------------------------------------------------------------------------- published numbers


@pytest.mark.slow
def test_mobilenetv2() -> None:
    import timm

    gm = trace(timm.create_model("mobilenetv2_100"), torch.randn(1, 3, 224, 224))
    assert cost(gm).macs == pytest.approx(300.8e6, abs=0.05e6)
    assert cost(gm).params == pytest.approx(3.5e6, rel=0.01)


@pytest.mark.slow
@pytest.mark.assets
def test_mcunet(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(assets))
    sys.modules.pop("zoo", None)
    import zoo  # pyright: ignore[reportMissingImports]

    gm = trace(zoo.mcunet(), torch.randn(1, 3, 176, 176))
    assert cost(gm).macs == 81_785_520
    merged = rewrite(gm, Plan.parse("merge_separable@blocks_0_dw_0"))
    assert cost(merged).macs / cost(gm).macs == pytest.approx(1.083, abs=0.0005)


@pytest.mark.slow
def test_merging_the_first_block_of_efficientnet_lite0() -> None:
    import timm

    gm = trace(timm.create_model("tf_efficientnet_lite0"), torch.randn(1, 3, 224, 224))
    first = next(n for n in layers(gm) if kind_of(gm, n) == "depthwise").name
    assert any(s.anchor == first and not s.blocked for s in find_sites(gm))
    merged = rewrite(gm, Plan.parse(f"merge_separable@{first}"))
    places = 112 * 112  # 3 x 3 depthwise on 32 channels and 32 -> 16, against 3 x 3 on 32 -> 16
    assert cost(merged).macs - cost(gm).macs == places * (9 * 32 * 16 - 9 * 32 - 32 * 16)
    assert cost(merged).macs / cost(gm).macs == pytest.approx(1.124, abs=0.001)


def test_networks_of_one_structure_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    whole = module._counted_macs

    def watched(gm: Any) -> int:
        counted.append(whole(gm))
        return counted[-1]

    monkeypatch.setattr(module, "_counted_macs", watched)
    x = torch.zeros(2, 3, 11, 7)
    first, wider, larger = (
        trace(randomise(nn.Sequential(nn.Conv2d(3, c, 3), nn.ReLU())), x[..., :h, :])
        for c, h in ((5, 9), (6, 9), (5, 11))
    )
    other = trace(randomise(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), 1), x[..., :9, :])
    kept = rewrite(first, Plan.parse(f"keep_float@{layers(first)[0].name}"))
    places = (7 * 5, 7 * 5, 9 * 5)
    expected = [27 * c * p for c, p in zip((5, 6, 5), places, strict=True)]
    assert [cost(gm).macs for gm in (first, wider, larger, other, kept)] == [
        *expected,
        expected[0],
        expected[0],
    ]
    assert len(counted) <= 3
    assert cost(kept).weight_bytes == 4 * cost(first).weight_bytes - 3 * 4 * 5
