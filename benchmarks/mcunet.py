"""MCUNet distilled from its own float model on unlabeled images that the evaluation never shows.

    quantfix table benchmarks/mcunet.yaml          # the first block replaced, closed form and distilled, with controls
    quantfix run benchmarks/mcunet.yaml --trials 12 --finetune knee

The images that train: the 100 calibration images of ImageNet and COCO's 192. Needs the assets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from video import SIDE, assets, square_pixels, zoo  # the folder of a config is on the import path


def network() -> nn.Module:
    return zoo().mcunet()


def data() -> Any:
    """The first 100 images of the assets calibrate, 550 evaluate."""
    return zoo().imagenet(resolution=SIDE)


class Images:
    """Inputs (3, 176, 176): the calibration images, then COCO's."""

    def __init__(self) -> None:
        self.known = data().calibration
        self.files = sorted((assets() / "coco128").rglob("*.jpg"))

    def __len__(self) -> int:
        return len(self.known) + len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        if index < len(self.known):
            return self.known[index]
        pixels = Image.fromarray(square_pixels(self.files[index - len(self.known)]))
        image = pixels.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1)
