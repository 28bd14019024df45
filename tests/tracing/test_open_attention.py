"""Attention of torch.nn and torchvision comes apart into layers that int8 knows, and stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from rewriter import profile, quantize, target
from rewriter.graph.lookup import layer_name, layers
from rewriter.int8.onnx import Session, to_onnx
from tests.networks import conv, kinds, randomise, traced

IMAGE = (3, 8, 8)
F = nn.functional


class Net(nn.Module):
    """A convolution, attention over its pixels, a linear layer."""

    def __init__(self, attention: nn.Module, batch_first: bool, look: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.attention, self.head = conv(3, 8, 2, stride=2), attention, nn.Linear(8, 3)
        self.batch_first, self.look = batch_first, look

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x).flatten(2)
        y = y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1)
        made = self.look(self.attention, y)
        if isinstance(made, tuple):
            return self.head(made[0]), made[1]
        return self.head(made)


def self_attention(m: nn.Module, y: Tensor) -> Tensor:
    return m(y, y, y, need_weights=False)[0]


def with_weights(m: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    return m(y, y, y)


def weights_of_each_head(m: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    return m(y, y, y, average_attn_weights=False)


def causal(m: nn.Module, y: Tensor) -> Tensor:
    hidden = torch.ones(16, 16, dtype=torch.bool).triu(1)
    return m(y, y, y, attn_mask=hidden, is_causal=True)[0]


def added_mask(m: nn.Module, y: Tensor) -> Tensor:
    return m(y, y, y, attn_mask=torch.linspace(-2, 2, 256).view(16, 16))[0]


def fewer_keys(m: nn.Module, y: Tensor) -> Tensor:
    first = y[:, :5] if m.batch_first else y[:5]
    return m(y, first, first)[0]


def padding(m: nn.Module, y: Tensor) -> Tensor:
    hidden = y[..., 0] > 0.3 if m.batch_first else (y[..., 0] > 0.3).transpose(0, 1)
    return m(y, y, y, key_padding_mask=hidden, need_weights=False)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "look",
    [
        self_attention,
        with_weights,
        weights_of_each_head,
        causal,
        added_mask,
        fewer_keys,
        padding,
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_projections_are_layers(look: Callable[..., Any], batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias)
    gm = traced(randomise(Net(attention, batch_first, look)), *IMAGE)
    assert not gm.meta["opaque"]
    parts = [f"attention.{p}_proj" for p in ("q", "k", "v", "out")]
    assert [layer_name(n) for n in layers(gm)] == ["conv", *parts, "head"]


def test_keys_and_values_of_other_widths() -> None:
    class Widths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.k, self.v = conv(3, 8, 2, stride=2), nn.Linear(8, 4), nn.Linear(8, 6)
            self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).flatten(2).permute(2, 0, 1)
            return self.attention(y, self.k(y), self.v(y))[0]

    gm = traced(randomise(Widths()), *IMAGE)
    assert len(layers(gm)) == 7


def test_keys_of_its_own_are_kept_whole() -> None:
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    gm = traced(randomise(Net(attention, False, self_attention)), *IMAGE)
    assert [o.kind for o in gm.meta["opaque"]] == ["MultiheadAttention"]
    runs_in_int8(gm, torch.randn(2, *IMAGE))


def runs_in_int8(gm: Any, x: Tensor) -> Session:
    profile(gm, [x])
    quantized = quantize(gm, target("onnxruntime"), [x])
    session = Session(to_onnx(quantized))
    for n in (1, 2):
        for found, expected in zip(session.run(x[:n]), _flat(gm(x[:n])), strict=True):
            noise = np.square(found - expected.numpy()).sum()
            assert noise < 0.05 * np.square(expected.numpy()).sum() + 1e-6
    return session


def _flat(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def encoder(m: nn.Module, y: Tensor) -> Tensor:
    return m(y)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder(batch_first: bool, norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    gm = traced(randomise(Net(model, batch_first, encoder)), *IMAGE)
    assert len(layers(gm)) == 2 + 2 * 6
    assert not gm.meta["opaque"]
    runs_in_int8(gm, torch.randn(2, *IMAGE))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_torchs_transformer() -> None:
    torch.manual_seed(0)

    def look(m: nn.Module, y: Tensor) -> Tensor:
        queries = torch.ones(3, 1, 8).repeat(1, y.shape[1], 1)
        return m(y, queries)

    gm = traced(randomise(Net(nn.Transformer(8, 2, 1, 1, 16), False, look)), *IMAGE)
    assert len(layers(gm)) == 2 + 6 + 10
    assert not gm.meta["opaque"]


def test_the_function_too() -> None:
    class Pool(nn.Module):
        """As CLIP pools: attention by the function, with layers of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(3, 8, 2, stride=2)
            self.q, self.k, self.v, self.c = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).flatten(2).permute(2, 0, 1)
            y = torch.cat([y.mean(0, keepdim=True), y])
            return F.multi_head_attention_forward(
                query=y[:1],
                key=y,
                value=y,
                embed_dim_to_check=8,
                num_heads=2,
                q_proj_weight=self.q.weight,
                k_proj_weight=self.k.weight,
                v_proj_weight=self.v.weight,
                in_proj_weight=None,
                in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
                bias_k=None,
                bias_v=None,
                add_zero_attn=False,
                dropout_p=0.0,
                out_proj_weight=self.c.weight,
                out_proj_bias=self.c.bias,
                use_separate_proj_weight=True,
                training=self.training,
                need_weights=False,
            )[0].squeeze(0)

    gm = traced(randomise(Pool()), *IMAGE)
    assert kinds(gm).count("Linear") == 4


def swin(**given: Any) -> nn.Module:
    torch.manual_seed(0)
    return SwinTransformer([4, 4], 8, [2, 2], [2, 2], [2, 2], num_classes=5, **given).eval()


@pytest.mark.parametrize(
    "model",
    [
        lambda: torchvision.models.VisionTransformer(8, 2, 1, 2, 8, 16, num_classes=5).eval(),
        swin,
        lambda: swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    ],
    ids=["vit", "swin", "swin_v2"],
)
def test_torchvision(model: Callable[[], nn.Module]) -> None:
    made = model()
    head: Any = made.heads.head if hasattr(made, "heads") else made.head
    nn.init.normal_(head.weight)
    size = (3, 8, 8) if hasattr(made, "heads") else (3, 32, 32)
    gm = traced(made, *size, tolerance=1e-4)
    assert not gm.meta["opaque"]
    assert "shifted_window_attention" not in kinds(gm)
    assert not any("cpb_mlp" in layer_name(n) for n in layers(gm))  # makes a constant


def test_the_fast_path_is_as_it_was() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    traced(randomise(Net(nn.MultiheadAttention(8, 2), False, self_attention)), *IMAGE)
    assert torch.backends.mha.get_fastpath_enabled() == before
