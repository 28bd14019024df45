"""Published architectures with random batch-norm statistics: the trace computes the same."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewriter.graph.lookup import layer_name, layers
from tests.networks import kinds, randomise, relative_error, traced

pytestmark = pytest.mark.slow

TIMM = (
    "mobilenetv2_100",
    "efficientnet_lite0",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "mnasnet_100",
    "resnet18",
    "regnetx_002",
    "repvgg_a0",
    "ghostnet_100",
    "convnext_atto",
)
TORCHVISION = (
    "shufflenet_v2_x0_5",
    "mobilenet_v3_small",
    "densenet121",
    "googlenet",
    "efficientnet_v2_s",
    "regnet_y_400mf",
    "squeezenet1_1",
    "mnasnet0_5",
    "resnext50_32x4d",
    "swin_t",
)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    import timm

    model = randomise(timm.create_model(name), 1)
    # 53 layers in float32 differ by 1e-5 from the exact result by themselves: compare in float64
    gm = traced(model, 3, 96, 96, sizes=(2,), tolerance=5e-5)
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(model.double()(x), copy.deepcopy(gm).double()(x)) < 1e-5
    assert not gm.meta["opaque"]
    if name not in ("repvgg_a0", "convnext_atto"):  # identity branches; layer norms
        assert "BatchNorm2d" not in kinds(gm)
    modules = dict(model.named_modules())
    assert all(layer_name(n) in modules for n in layers(gm))
    assert "Conv2d" in kinds(gm)


def test_names_of_the_same_padding_of_tensorflow() -> None:
    import timm

    gm = traced(randomise(timm.create_model("tf_efficientnet_lite0")), 3, 64, 64, sizes=(2,))
    names = [n.name for n in layers(gm)]
    assert names[:2] == ["conv_stem", "blocks_0_0_conv_dw"]
    assert "ZeroPad2d" in kinds(gm)


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.filterwarnings("ignore")
def test_torchvision(name: str) -> None:
    from torchvision import models

    settings = {"init_weights": False} if name == "googlenet" else {}
    gm = traced(
        randomise(getattr(models, name)(weights=None, **settings), 1), 3, 64, 64, sizes=(2,)
    )
    assert not gm.meta["opaque"]
    assert "stochastic_depth" not in kinds(gm)


@pytest.mark.filterwarnings("ignore")
def test_heads_of_a_detector() -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
            self.backbone, self.head = whole.backbone, whole.head

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return self.head(list(self.backbone(x).values()))

    gm = traced(randomise(Raw(), 1), 3, 160, 160, sizes=(2,))
    assert not gm.meta["opaque"]
    assert "BatchNorm2d" not in kinds(gm)


@pytest.mark.filterwarnings("ignore")
def test_segmentation_returns_a_dictionary() -> None:
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)
    gm = traced(randomise(model, 1), 3, 65, 65, sizes=(2,))
    assert not gm.meta["opaque"]
    assert list(gm(torch.randn(1, 3, 65, 65))) == ["out"]


@pytest.mark.assets
@pytest.mark.parametrize(("name", "size"), [("mcunet", 176), ("yolo_fastest", 320)])
def test_trained_networks(
    name: str, size: int, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(assets))
    sys.modules.pop("zoo", None)
    import zoo  # pyright: ignore[reportMissingImports]

    gm = traced(getattr(zoo, name)(), 3, size, size, sizes=(2,))
    assert not gm.meta["opaque"]
    assert "BatchNorm2d" not in kinds(gm)
