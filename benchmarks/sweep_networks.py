"""The networks of ``sweep.py``: at most about 32 M parameters, of as many families as there are."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection, segmentation, video

Shape = tuple[int, ...]

_TIMM = """
efficientnet_lite0 mobilenetv2_100 mobilenetv3_small_050 mobilenetv4_conv_small efficientnet_b0 tf_efficientnet_lite0
fbnetc_100 mnasnet_small semnasnet_075 spnasnet_100 mixnet_s tinynet_e hardcorenas_a lcnet_050 lcnetv2_small
resnet18 resnet26d resnext26ts resnetv2_18 skresnet18 legacy_seresnet18 seresnext26ts ecaresnet26t resnest14d
res2net50_14w_8s repvgg_a0 mobileone_s0 gernet_s regnetx_002 regnety_002 regnetz_005 rexnet_100 dla34 dpn48b
densenet121 vovnet39a ese_vovnet19b_slim hrnet_w18_small darknet17 cs3darknet_s cspnext_tiny selecsls42
hgnetv2_b0 ghostnet_050 repghostnet_050 repvit_m0_9 starnet_s050 fasternet_t0 tresnet_m nf_regnet_b0 nf_resnet26
legacy_xception xception41 inception_v3 convnext_atto convnext_atto_ols convnextv2_atto convmixer_768_32 inception_next_atto
edgenext_xx_small mambaout_femto poolformer_s12 rdnet_tiny mobilevit_xxs mobilevitv2_050 efficientformer_l1
efficientformerv2_s0 efficientvit_b0 efficientvit_m0 fastvit_t8 swiftformer_xs shvit_s1 iformer_t lowformer_b0 cpubone_nano
efficientvim_m1 csatv2 levit_128 pit_ti_224 pvt_v2_b0 coat_tiny coatnet_pico_rw_224 maxvit_pico_rw_256 halonet_h1
eca_botnext26ts_256 visformer_tiny xcit_nano_12_p16_224 crossvit_tiny_240 convit_tiny cait_xxs24_224 deit_tiny_patch16_224
test_vit test_vit_relpos vit_tiny_r_s16_p8_224 mixer_s16_224 gmlp_ti16_224 tiny_vit_5m_224 gcvit_xxtiny
swin_tiny_patch4_window7_224 mvitv2_tiny
"""
_TORCHVISION = """
densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 mnasnet0_5 mobilenet_v2 mobilenet_v3_small
mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x2_0
squeezenet1_0 squeezenet1_1 convnext_tiny swin_t swin_v2_t maxvit_t vit_tiny
"""
_SEGMENTATION = """
lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large fcn_resnet18 deeplabv3_resnet18 unet_resize
"""
_DETECTION = """
ssdlite320_mobilenet_v3_large ssd300_vgg16 fcos_resnet18 retinanet_resnet18 rpn_mobilenet_v3 rpn_resnet18_frozen
keypoints_resnet18
"""
_VIDEO = "mc3_18 s3d r2plus1d_small swin3d_small raft_small"

NETWORKS = tuple(
    f"{group}/{name}"
    for group, names in (
        ("timm", _TIMM),
        ("torchvision", _TORCHVISION),
        ("segmentation", _SEGMENTATION),
        ("detection", _DETECTION),
        ("video", _VIDEO),
    )
    for name in names.split()
)


def build(name: str) -> tuple[nn.Module, Shape]:
    """A network in eval mode and the smallest input shape (without the batch) that it takes."""
    torch.manual_seed(0)
    group, _, name = name.partition("/")
    made: Any = {
        "timm": _timm,
        "torchvision": _torchvision,
        "segmentation": _segmentation,
        "detection": _detection,
        "video": _video,
    }[group](name)
    model, shapes = made
    return model.eval(), _first_that_runs(model.eval(), shapes)


def _first_that_runs(model: nn.Module, shapes: list[Shape]) -> Shape:
    for shape in shapes[:-1]:
        try:
            with torch.no_grad():
                model(torch.zeros(2, *shape))
        except Exception:  # too small for it, whatever it says
            continue
        return shape
    return shapes[-1]


def images(count: int, shape: Shape) -> Tensor:
    """(count, *shape) smooth random images."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(count, *shape[:-2], 6, 6, generator=generator).flatten(0, -4)
    size: Any = shape[-2:]
    smooth = nn.functional.interpolate(small, size=size, mode="bilinear", align_corners=False)
    smooth = smooth.view(count, *shape)
    return smooth + 0.2 * torch.randn(smooth.shape, generator=generator)


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Give every batch norm the statistics of the images, as a trained one has them; edits the model."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    if norms:
        model(x)
    model.eval()
    for m in norms:
        m.momentum = 0.1


def _timm(name: str) -> tuple[nn.Module, list[Shape]]:
    own = timm.get_pretrained_cfg(name)
    size = own.input_size if own is not None else (3, 224, 224)
    return timm.create_model(name), [(3, 64, 64), (3, 96, 96), (3, 128, 128), size]


def _torchvision(name: str) -> tuple[nn.Module, list[Shape]]:
    sizes = [(3, 64, 64), (3, 96, 96), (3, 128, 128), (3, 224, 224)]
    if name == "vit_tiny":
        return torchvision.models.VisionTransformer(64, 8, 4, 4, 64, 128, num_classes=10), sizes[
            :1
        ]
    given: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        given = {"init_weights": False, "aux_logits": False}
    if name == "maxvit_t":
        sizes = sizes[-1:]
    return torchvision.models.get_model(name, weights=None, **given), sizes


class _Only(nn.Module):
    """The backbone of a detector and one of its heads, on a batch of images."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Any:
        features = self.backbone(x)
        values = list(features.values()) if isinstance(features, dict) else [features]
        return self.head(values)


class _Out(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)["out"]


def _pyramid(norm: Any = nn.BatchNorm2d) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5
    )


def _segmentation(name: str) -> tuple[nn.Module, list[Shape]]:
    sizes: list[Shape] = [(3, 96, 96)]
    if name == "unet_resize":
        return _UNet(), [(3, 47, 61)]
    if name.endswith("resnet18"):
        from torchvision.models._utils import IntermediateLayerGetter
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead
        from torchvision.models.segmentation.fcn import FCNHead

        backbone = IntermediateLayerGetter(
            torchvision.models.resnet18(weights=None), {"layer4": "out"}
        )
        head = FCNHead(512, 21) if name.startswith("fcn") else DeepLabHead(512, 21)
        kind: Any = segmentation.FCN if name.startswith("fcn") else segmentation.DeepLabV3
        return _Out(kind(backbone, head)), sizes
    make: Any = getattr(segmentation, name)
    return _Out(make(weights=None, weights_backbone=None)), sizes


class _UNet(nn.Module):
    """Odd sizes: resizing by no whole factor, to the size of a skip, with and without corners aligned."""

    def __init__(self) -> None:
        super().__init__()

        def block(a: int, b: int, stride: int = 1) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
            )

        self.down = nn.ModuleList([block(3, 16), block(16, 24, 2), block(24, 32, 2)])
        self.up = nn.ModuleList([block(56, 24), block(40, 16)])
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down[0](x)
        second = self.down[1](first)
        y = self.down[2](second)
        resize = nn.functional.interpolate
        y = resize(y, size=second.shape[-2:], mode="bilinear", align_corners=False)
        y = self.up[0](torch.cat([y, second], 1))
        y = resize(y, size=first.shape[-2:], mode="bilinear", align_corners=True)
        y = self.up[1](torch.cat([y, first], 1))
        return resize(self.head(y), scale_factor=1.5, mode="nearest")


def _detection(name: str) -> tuple[nn.Module, list[Shape]]:
    sizes: list[Shape] = [(3, 96, 96)]
    given: Any = {"weights": None, "weights_backbone": None}
    if name.startswith("ssd"):
        model: Any = getattr(detection, name)(**given)
        size = 320 if "320" in name else 300
        return _Only(model.backbone, model.head), [(3, size, size)]
    if name == "rpn_mobilenet_v3":
        model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(**given)
        return _Only(model.backbone, model.rpn.head), sizes
    norm: Any = torchvision.ops.FrozenBatchNorm2d if "frozen" in name else nn.BatchNorm2d
    backbone = _pyramid(norm)
    if name.startswith("fcos"):
        model = detection.FCOS(backbone, 10)
    elif name.startswith("retinanet"):
        model = detection.RetinaNet(backbone, 10)
    elif name.startswith("keypoints"):
        model = detection.KeypointRCNN(backbone, 2)
        return _Only(backbone, _Points(model.roi_heads)), sizes
    else:
        model = detection.FasterRCNN(backbone, 2)
        return _Only(backbone, model.rpn.head), sizes
    return _Only(model.backbone, model.head), sizes


class _Points(nn.Module):
    """The keypoint head on the finest level, in place of regions cut from it."""

    def __init__(self, heads: Any) -> None:
        super().__init__()
        self.head, self.last = heads.keypoint_head, heads.keypoint_predictor

    def forward(self, levels: list[Tensor]) -> Tensor:
        return self.last(self.head(levels[0]))


def _video(name: str) -> tuple[nn.Module, list[Shape]]:
    if name == "raft_small":
        from torchvision.models.optical_flow import raft_small

        return _Pair(raft_small(weights=None)), [(3, 128, 128)]
    if name == "swin3d_small":
        model: Any = torchvision.models.video.SwinTransformer3d(
            [2, 4, 4], 24, [1, 1], [2, 4], [4, 4, 4], num_classes=10
        )
        return model, [(3, 4, 32, 32)]
    if name == "r2plus1d_small":
        model = video.VideoResNet(
            video.resnet.BasicBlock,
            [video.resnet.Conv2Plus1D] * 4,  # pyright: ignore[reportArgumentType]
            [1, 1, 1, 1],
            video.resnet.R2Plus1dStem,
            num_classes=10,
        )
        return model, [(3, 4, 32, 32)]
    return getattr(video, name)(weights=None), [(3, 14 if name == "s3d" else 4, 64, 64)]


class _Pair(nn.Module):
    """The flow between an image and the same shifted; one update."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, x.roll(2, 3), 1)[-1]
