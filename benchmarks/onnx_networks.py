"""The files of ``onnx_files.py``: which networks, through which exporter, with which operator set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from sweep_networks import build, images, settle
from torch import Tensor, nn

F = nn.functional
Shape = tuple[int, ...]

_NEW = """
torchvision/resnet18 torchvision/mobilenet_v2 torchvision/mobilenet_v3_small torchvision/efficientnet_b0
torchvision/shufflenet_v2_x0_5 torchvision/squeezenet1_1 torchvision/densenet121 torchvision/regnet_y_400mf
torchvision/convnext_tiny torchvision/swin_t torchvision/swin_v2_t torchvision/vit_tiny timm/test_vit timm/repvit_m0_9
timm/mobilevitv2_050 timm/ghostnet_050 timm/fastvit_t8 timm/edgenext_xx_small timm/poolformer_s12
timm/efficientformerv2_s0 timm/mixer_s16_224 segmentation/unet_resize segmentation/lraspp_mobilenet_v3_large
detection/ssdlite320_mobilenet_v3_large detection/fcos_resnet18 own/attention own/lstm own/gru own/nhwc own/shapes own/decoder
own/two_inputs own/sequence
"""
_OLD = """
torchvision/resnet18/old11 torchvision/mobilenet_v3_small/old13 torchvision/efficientnet_b0/old16
torchvision/shufflenet_v2_x0_5/old17 torchvision/vit_tiny/old14 torchvision/swin_t/old17 timm/mobilevitv2_050/old17
timm/efficientformerv2_s0/old17 segmentation/unet_resize/old13 own/attention/old14 own/attention/old17 own/lstm/old11
own/gru/old13 own/nhwc/old12 own/shapes/old11 own/decoder/old16 own/two_inputs/old14 own/sequence/old17
"""
_FORMS = """
torchvision/mobilenet_v3_small/new20 torchvision/mobilenet_v3_small/new20_fixed own/attention/new19
torchvision/vit_tiny/new20_fixed own/shapes/new18_fixed own/lstm/new18_fixed own/gru/new18_fixed own/nhwc/new18_fixed
own/attention/new18_fixed torchvision/swin_t/new18_fixed timm/test_vit/new20_fixed
torchvision/resnet18/new18_external torchvision/mobilenet_v2/old13_half torchvision/resnet18/old13_half_weights
own/attention/old17_half own/attention/old14_half_weights
"""
EXPORTS = (
    *(f"{n}/new18" for n in _NEW.split()),
    *_OLD.split(),
    *_FORMS.split(),
)


def exported(name: str, folder: Path) -> Path:
    """Write one file: ``GROUP/NETWORK/EXPORTERopset`` and a form, such as ``own/lstm/new18_fixed``."""
    group, network, how = name.split("/")
    how, _, form = how.partition("_")
    model, shapes = _OWN[network]() if group == "own" else _wrapped(build(f"{group}/{network}"))
    torch.manual_seed(0)
    x = tuple(
        images(8, s) if len(s) == 3 and min(s[-2:]) > 5 else torch.randn(8, *s) for s in shapes
    )
    if len(x) == 1:
        settle(model, x[0])
    # an example of two samples: with one, the new exporter takes the batch for a constant
    example = tuple(v[: 1 if form == "fixed" else 2] for v in x)
    path = folder / "net.onnx"
    if form == "half":
        model, example = model.half(), tuple(v.half() for v in example)
    names = [f"in_{i}" for i in range(len(x))]
    given: dict[str, Any] = {"input_names": names, "opset_version": int(how[3:])}
    if how.startswith("old"):
        if form != "fixed":
            given["dynamic_axes"] = {n: {0: "batch"} for n in names}
        torch.onnx.export(model, example, str(path), dynamo=False, **given)
    else:
        if form != "fixed":
            given["dynamic_shapes"] = tuple(
                {0: torch.export.Dim("batch", min=1, max=64)} for _ in x
            )
            if len(x) == 1:
                given["dynamic_shapes"] = (given["dynamic_shapes"][0],)
        torch.onnx.export(
            model,
            example,
            str(path),
            dynamo=True,
            external_data=form == "external",
            verbose=False,
            **given,
        )
    if form == "half_weights":
        _weights_in_half(path)
    return path


def _wrapped(found: tuple[nn.Module, Shape]) -> tuple[nn.Module, list[Shape]]:
    model, shape = found
    return _Flat(model).eval(), [shape]


class _Flat(nn.Module):
    """Outputs in lists and mappings one after the other, as a file has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        leaves = torch.utils._pytree.tree_leaves(self.model(x))
        return leaves[0] if len(leaves) == 1 else tuple(leaves)


def _weights_in_half(path: Path) -> None:
    """Keep weights in float16 and cast each where it is read, as converters that save space do."""
    model = onnx.load(str(path))
    graph = model.graph
    casts: list[onnx.NodeProto] = []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) > 1:
            half = numpy_helper.to_array(tensor).astype(np.float16)
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
            casts.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(path))


class _Attention(nn.Module):
    """A text-like transformer's layers as model hubs write them: reshaped heads, a mask added, two norms, a pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 48, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 48))
        self.position = nn.Parameter(torch.randn(1, 65, 48))
        self.query, self.key, self.value = (nn.Linear(48, 48) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(48, 48), nn.Linear(48, 96), nn.Linear(96, 48)
        self.first, self.second = nn.LayerNorm(48, 1e-12), nn.LayerNorm(48, 1e-12)
        self.head = nn.Linear(48, 10)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), 4, 12).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.position
        mask = y.new_ones(y.shape[:2])[:, None, None, :]
        mask = (1.0 - mask) * -10000.0
        z = self.first(y)
        score = self.split(self.query(z)) @ self.split(self.key(z)).transpose(-1, -2) / 12**0.5
        weight = F.softmax(score + mask, dim=-1)
        context = (weight @ self.split(self.value(z))).permute(0, 2, 1, 3).contiguous()
        y = y + self.out(context.view(*context.shape[:-2], 48))
        y = y + self.down(F.gelu(self.up(self.second(y))))
        return torch.tanh(self.head(y[:, 0]))


class _Sequence(nn.Module):
    """Sequence-first encoder of torch's own layers behind a convolution, as detectors with queries have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.BatchNorm2d(32), nn.ReLU())
        self.attention = nn.MultiheadAttention(32, 4)
        self.norm, self.queries = nn.LayerNorm(32), nn.Parameter(torch.randn(5, 32))
        self.cross = nn.MultiheadAttention(32, 4)
        self.classes, self.boxes = nn.Linear(32, 7), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem(x).flatten(2).permute(2, 0, 1)
        y = self.norm(y + self.attention(y, y, y, need_weights=False)[0])
        q = self.queries.unsqueeze(1).repeat(1, x.shape[0], 1)
        q = q + self.cross(q, y, y, need_weights=False)[0]
        q = q.transpose(0, 1)
        return self.classes(q), self.boxes(q).sigmoid()


class _Recurrent(nn.Module):
    """Columns of a convolution's result as a sequence, two bidirectional layers, a softmax: a reader of text lines."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish(), nn.Conv2d(16, 24, 3, (2, 1), 1), nn.ReLU(),
        )  # fmt: skip
        self.recurrent = kind(24, 20, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(40, 11)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(self.stem(x), (8, 1)).squeeze(2).permute(0, 2, 1)
        y, _ = self.recurrent(y)
        return self.head(y).softmax(2)


class _Nhwc(nn.Module):
    """Images with channels last, padding on one side, norms as arithmetic, hard sigmoids with a slope of 0.2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2)
        self.depthwise = nn.Conv2d(16, 16, 3, 2, groups=16, bias=False)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.point = nn.Conv2d(16, 32, 1, bias=False)
        self.register_buffer("scale", torch.rand(1, 1, 1, 32) + 0.5)
        self.register_buffer("shift", torch.randn(1, 1, 1, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 3, 1, 2)
        y = F.relu6(self.stem(F.pad(y, (0, 1, 0, 1))))
        y = self.depthwise(F.pad(y, (0, 1, 0, 1))).permute(0, 2, 3, 1).permute(0, 3, 1, 2)
        y = y * F.relu6(y + 3) * 0.16666667
        gate = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        y = y * (gate * 0.2 + 0.5).clamp(0, 1)
        y = self.point(y).permute(0, 2, 3, 1)
        y = F.relu(y * self.scale + self.shift)
        return F.softmax(self.head(y.mean((1, 2))), dim=-1)


class _Shapes(nn.Module):
    """Sizes computed from the input: resizing to the size of a skip, views with sizes read off, slices, a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = (
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.Conv2d(24, 12, 3, 1, 1),
        )
        self.head = nn.Conv2d(12, 18, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = F.leaky_relu(self.down(x), 0.1)
        b = F.silu(self.deep(a))
        b = F.interpolate(b, size=a.shape[2:], mode="bilinear", align_corners=False)
        y = F.relu(self.up(torch.cat([b, a], 1)))
        n, _, h, w = y.shape
        y = self.head(y).view(n, 3, 6, h, w).permute(0, 1, 3, 4, 2).contiguous()
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack([columns, rows], -1).view(1, 1, h, w, 2).float()
        centers = (y[..., :2].sigmoid() * 2 - 0.5 + grid) * 8
        sizes = (y[..., 2:4].sigmoid() * 2) ** 2 * 10
        return torch.cat([centers, sizes, y[..., 4:].sigmoid()], -1).view(n, -1, 6), x.flip(
            1
        ).mean(1)


class _Decoder(nn.Module):
    """Transposed convolutions, instance and group norms, reflection pads, pixel shuffle: an image from an image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ReflectionPad2d(2), nn.Conv2d(3, 16, 5), nn.InstanceNorm2d(16, affine=True), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(8, 32), nn.SiLU(), nn.ConvTranspose2d(32, 16, 3, 2, 1, 1),
            nn.PReLU(16), nn.Conv2d(16, 12, 3, 1, 1), nn.PixelShuffle(2), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return F.interpolate(y, scale_factor=0.5, mode="nearest") + 0.1 * x


class _Two(nn.Module):
    """An image and a vector that modulates it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.style, self.head = (
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.Linear(6, 32),
            nn.Linear(16, 5),
        )

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        scale, shift = self.style(vector).chunk(2, 1)
        y = F.relu(self.conv(image) * (1 + scale[..., None, None]) + shift[..., None, None])
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


_OWN: dict[str, Callable[[], tuple[nn.Module, list[Shape]]]] = {
    "attention": lambda: (_Attention().eval(), [(3, 64, 64)]),
    "sequence": lambda: (_Sequence().eval(), [(3, 64, 64)]),
    "lstm": lambda: (_Recurrent(nn.LSTM).eval(), [(3, 32, 96)]),
    "gru": lambda: (_Recurrent(nn.GRU).eval(), [(3, 32, 96)]),
    "nhwc": lambda: (_Nhwc().eval(), [(64, 48, 3)]),
    "shapes": lambda: (_Shapes().eval(), [(3, 47, 61)]),
    "decoder": lambda: (_Decoder().eval(), [(3, 32, 40)]),
    "two_inputs": lambda: (_Two().eval(), [(3, 32, 32), (6,)]),
}
