"""Small SiLU detectors with the parts and the endings of those that people deploy.

Random weights, batch norms calibrated on random images, and a few stem channels made far wider
than the others, as trained networks have them: their readers take the factor back, so that the
float network hardly changes, and int8 with one range for the stem's output loses the narrow ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 5
STRIDES = (8, 16, 32)


def conv(i: int, o: int, k: int = 1, s: int = 1, g: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False),
        nn.BatchNorm2d(o, eps=1e-3, momentum=0.03),
        nn.SiLU(inplace=True),
    )


class Focus(nn.Module):
    """Four neighboring pixels become channels."""

    def __init__(self, o: int) -> None:
        super().__init__()
        self.conv = conv(12, o, 3)

    def forward(self, x: Tensor) -> Tensor:
        corners = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        return self.conv(torch.cat(corners, dim=1))


class Bottleneck(nn.Module):
    def __init__(self, c: int, depthwise: bool) -> None:
        super().__init__()
        self.cv1 = conv(c, c)
        self.cv2 = nn.Sequential(conv(c, c, 3, g=c), conv(c, c)) if depthwise else conv(c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C3(nn.Module):
    """Two convolutions read the input; one goes through bottlenecks."""

    def __init__(self, i: int, o: int, n: int = 1, depthwise: bool = False) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(i, o // 2), conv(i, o // 2)
        self.cv3 = conv(o, o)
        self.m = nn.Sequential(*(Bottleneck(o // 2, depthwise) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C2f(nn.Module):
    """One convolution, cut in two; all that the bottlenecks make is concatenated."""

    def __init__(self, i: int, o: int, n: int = 1, depthwise: bool = False) -> None:
        super().__init__()
        self.c = o // 2
        self.cv1, self.cv2 = conv(i, o), conv((2 + n) * self.c, o)
        self.m = nn.ModuleList(Bottleneck(self.c, depthwise) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(c, c // 2), conv(2 * c, c)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        a = self.pool(x)
        b = self.pool(a)
        return self.cv2(torch.cat((x, a, b, self.pool(b)), 1))


class Neck(nn.Module):
    """Backbone and a top-down, bottom-up pyramid: three maps of 2w, 4w and 8w channels."""

    def __init__(self, w: int, block: type[C3] | type[C2f], stem: nn.Module, n: int) -> None:
        super().__init__()
        self.stem = stem
        self.dark2 = nn.Sequential(conv(w, w, 3, 2), block(w, w, n))
        self.dark3 = nn.Sequential(conv(w, 2 * w, 3, 2), block(2 * w, 2 * w, n))
        self.dark4 = nn.Sequential(conv(2 * w, 4 * w, 3, 2), block(4 * w, 4 * w, n))
        self.dark5 = nn.Sequential(conv(4 * w, 8 * w, 3, 2), block(8 * w, 8 * w, n), SPPF(8 * w))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.up4, self.up3 = block(12 * w, 4 * w), block(6 * w, 2 * w)
        self.down4, self.down5 = conv(2 * w, 2 * w, 3, 2), conv(4 * w, 4 * w, 3, 2)
        self.pan4, self.pan5 = block(6 * w, 4 * w), block(12 * w, 8 * w)

    def forward(self, x: Tensor) -> list[Tensor]:
        c3 = self.dark3(self.dark2(self.stem(x)))
        c4 = self.dark4(c3)
        c5 = self.dark5(c4)
        p4 = self.up4(torch.cat([self.up(c5), c4], 1))
        p3 = self.up3(torch.cat([self.up(p4), c3], 1))
        p4 = self.pan4(torch.cat([self.down4(p3), p4], 1))
        return [p3, p4, self.pan5(torch.cat([self.down5(p4), c5], 1))]


class Shallow(nn.Module):
    """Three maps of 2w, 4w and 8w channels from as few layers as can be: little to add up."""

    def __init__(self, w: int, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.dark2 = nn.Sequential(conv(w, 2 * w, 3, 2))
        self.maps = nn.ModuleList(conv(2 * w, c * w) for c in (2, 4, 8))
        self.pools = nn.ModuleList(nn.AvgPool2d(k) for k in (2, 4, 8))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.dark2(self.stem(x))
        return [m(pool(x)) for m, pool in zip(self.maps, self.pools, strict=True)]


class Yolox(nn.Module):
    """Decoupled heads; the graph ends in cat(boxes, sigmoid objectness, sigmoid classes).

    Args:
        n: bottlenecks in each block; 0: a shallow body.
        decode: whether boxes come out in pixels, (N, A, 5 + classes), or raw.
    """

    def __init__(self, w: int = 8, n: int = 1, decode: bool = False) -> None:
        super().__init__()
        self.neck = Neck(w, C3, Focus(w), n) if n else Shallow(w, Focus(w))
        self.decode = decode
        h = 2 * w
        self.stems = nn.ModuleList(conv(c, h) for c in (2 * w, 4 * w, 8 * w))
        self.cls_convs = nn.ModuleList(conv(h, h, 3) for _ in STRIDES)
        self.reg_convs = nn.ModuleList(conv(h, h, 3) for _ in STRIDES)
        self.cls_preds = nn.ModuleList(nn.Conv2d(h, CLASSES, 1) for _ in STRIDES)
        self.reg_preds = nn.ModuleList(nn.Conv2d(h, 4, 1) for _ in STRIDES)
        self.obj_preds = nn.ModuleList(nn.Conv2d(h, 1, 1) for _ in STRIDES)

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for k, feature in enumerate(self.neck(x)):
            f = self.stems[k](feature)
            reg = self.reg_convs[k](f)
            scores = self.cls_preds[k](self.cls_convs[k](f)).sigmoid()
            joined = [self.reg_preds[k](reg), self.obj_preds[k](reg).sigmoid(), scores]
            outputs.append(torch.cat(joined, 1))
        sizes = [o.shape[-2:] for o in outputs]
        y = torch.cat([o.flatten(start_dim=2) for o in outputs], dim=2).permute(0, 2, 1)
        return self.decoded(y, sizes) if self.decode else y

    def decoded(self, y: Tensor, sizes: list[torch.Size]) -> Tensor:
        grids, strides = [], []
        for (h, w), stride in zip(sizes, STRIDES, strict=True):
            yv, xv = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            grids.append(torch.stack((xv, yv), 2).view(1, -1, 2))
            strides.append(torch.full((1, h * w, 1), stride))
        grid, step = torch.cat(grids, 1).type_as(y), torch.cat(strides, 1).type_as(y)
        center = (y[..., 0:2] + grid) * step
        return torch.cat([center, torch.exp(y[..., 2:4]) * step, y[..., 4:]], dim=-1)


class DFL(nn.Module):
    """The expectation of a distribution over bins, as a fixed convolution."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins).float().view(1, bins, 1, 1)
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        bins = x.view(b, 4, self.bins, a).transpose(2, 1).softmax(1)
        return self.conv(bins).view(b, 4, a)


class Yolov8(nn.Module):
    """C2f blocks, heads that give distributions over bins, boxes in pixels beside scores.

    Args:
        weighted_sum: the expectation is a product with constants and a sum, no convolution.
    """

    def __init__(self, w: int = 8, n: int = 1, bins: int = 8, weighted_sum: bool = False) -> None:
        super().__init__()
        stem = conv(3, w, 3, 2)
        self.neck = Neck(w, C2f, stem, n) if n else Shallow(w, stem)
        h = max(16, 4 * bins)
        self.bins = bins
        channels = (2 * w, 4 * w, 8 * w)
        self.cv2 = nn.ModuleList(
            nn.Sequential(conv(c, h, 3), nn.Conv2d(h, 4 * bins, 1)) for c in channels
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(conv(c, h, 3), nn.Conv2d(h, CLASSES, 1)) for c in channels
        )
        self.dfl = None if weighted_sum else DFL(bins)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = [
            torch.cat((box(p), score(p)), 1)
            for p, box, score in zip(self.neck(x), self.cv2, self.cv3, strict=True)
        ]
        rows = torch.cat([m.view(m.shape[0], 4 * self.bins + CLASSES, -1) for m in maps], 2)
        box, scores = rows.split((4 * self.bins, CLASSES), 1)
        points, step = self.anchors(maps)
        low, high = self.distances(box).chunk(2, 1)
        a, b = points - low, points + high
        boxes = torch.cat(((a + b) / 2, b - a), 1) * step
        return torch.cat((boxes, scores.sigmoid()), 1), maps

    def distances(self, box: Tensor) -> Tensor:
        if self.dfl is not None:
            return self.dfl(box)
        b, _, a = box.shape
        p = box.reshape(b, 4, self.bins, a).softmax(2)
        return (p * torch.arange(self.bins).float().view(1, 1, -1, 1)).sum(2)

    def anchors(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        points, steps = [], []
        for m, stride in zip(maps, STRIDES, strict=True):
            h, w = m.shape[-2:]
            y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
            points.append(torch.stack((x, y), -1).view(-1, 2))
            steps.append(torch.full((h * w, 1), float(stride)))
        return torch.cat(points).T.unsqueeze(0), torch.cat(steps).T


class Yolov5(nn.Module):
    """One head convolution for each scale, decoded anchor by anchor; the raw maps come out too."""

    anchors = ((10, 13, 16, 30, 33, 23), (30, 61, 62, 45, 59, 119), (116, 90, 156, 198, 373, 326))

    def __init__(self, w: int = 8, n: int = 1) -> None:
        super().__init__()
        stem: Any = conv(3, w, 6, 2)
        stem[0].padding = (2, 2)
        self.neck = Neck(w, C3, stem, n) if n else Shallow(w, stem)
        self.no = CLASSES + 5
        self.m = nn.ModuleList(nn.Conv2d(c, 3 * self.no, 1) for c in (2 * w, 4 * w, 8 * w))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        maps, rows = [], []
        for k, feature in enumerate(self.neck(x)):
            y = self.m[k](feature)
            b, _, h, w = y.shape
            y = y.view(b, 3, self.no, h, w).permute(0, 1, 3, 4, 2).contiguous()
            maps.append(y)
            gy, gx = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            grid = torch.stack((gx, gy), 2).expand(1, 3, h, w, 2) - 0.5
            size = torch.tensor(self.anchors[k]).float().view(1, 3, 1, 1, 2)
            xy, wh, conf = y.sigmoid().split((2, 2, self.no - 4), 4)
            decoded = torch.cat(((xy * 2 + grid) * STRIDES[k], (wh * 2) ** 2 * size, conf), 4)
            rows.append(decoded.view(b, 3 * h * w, self.no))
        return torch.cat(rows, 1), {"maps": maps}


# ------------------------------------------------------------------------------- weights and data


def images(count: int, size: int = 64, seed: int = 0) -> Tensor:
    """(count, 3, size, size) smooth random pictures in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, size // 8, size // 8, generator=g)
    fine = torch.rand(count, 3, size, size, generator=g)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
    return (0.8 * smooth + 0.2 * fine).clamp(0, 1)


def trained(model: nn.Module, wide: float = 100.0, seed: int = 0, size: int = 64) -> nn.Module:
    """Edit model: random weights, calibrated batch norms, uneven channels behind the stem."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d) and m.weight.requires_grad:
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu", generator=generator)
                if m.bias is not None:  # what comes out stays in the range of exp and sigmoid
                    m.weight *= 0.5
                    nn.init.normal_(m.bias, -1.0, 1.0, generator=generator)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.6, 1.6, generator=generator)
                nn.init.normal_(m.bias, 0.0, 0.4, generator=generator)
                m.momentum = None
        model.train()
        model(images(16, size, seed + 1))
        model.eval()
        if wide != 1.0:
            _widen(model, wide)
    return model


def _widen(model: nn.Module, wide: float) -> None:
    """Make a quarter of the stem's channels ``wide`` times larger, and its readers' weights less.

    SiLU is not homogeneous: the values change where they are small, and the float network with
    them. It stays a network of the same kind; all is compared with what it is then.
    """
    stem: Any = model.neck.stem
    stem = stem.conv if isinstance(stem, Focus) else stem
    reader = model.neck.dark2[0][0]
    channels = list(range(0, stem[0].out_channels, 4))
    stem[1].weight[channels] *= wide
    stem[1].bias[channels] *= wide
    reader.weight[:, channels] /= wide
