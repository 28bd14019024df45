"""The published weights of EfficientNet-Lite0 on timm's names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from search.config.schema import ConfigError
from search.data import lite0
from search.data.lite0 import renamed

STAGES = (1, 2, 2, 3, 3, 4, 1)


def published() -> dict[str, torch.Tensor]:
    """A state dict with the names of the package, which lists tensors in the order in which timm does."""
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    back = {
        "conv_stem": "_conv_stem",
        "bn1": "_bn0",
        "conv_head": "_conv_head",
        "bn2": "_bn1",
        "classifier": "_fc",
    }
    names: dict[str, torch.Tensor] = {}
    first = {
        "conv_dw": "_depthwise_conv",
        "bn1": "_bn1",
        "conv_pw": "_project_conv",
        "bn2": "_bn2",
    }
    other = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
             "conv_pwl": "_project_conv", "bn3": "_bn2"}  # fmt: skip
    for key, value in net.state_dict().items():
        part, *rest = key.split(".")
        if part != "blocks":
            names[f"{back[part]}.{'.'.join(rest)}"] = value
            continue
        stage, block, name, *tensor = rest
        number = sum(STAGES[: int(stage)]) + int(block)
        inner = (other if number else first)[name]
        names[f"_blocks.{number}.{inner}.{'.'.join(tensor)}"] = value
    return names


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / lite0.PACKAGE
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, lite0.PACKAGE, raising=False)
    return folder / lite0.FILE


def test_every_published_tensor_has_its_place() -> None:
    state = published()
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    assert sorted(renamed(key, STAGES) for key in state) == sorted(net.state_dict())
    shapes = {renamed(key, STAGES): value.shape for key, value in state.items()}
    assert shapes == {key: value.shape for key, value in net.state_dict().items()}


def test_the_network_computes_with_the_file_of_the_package(package: Path) -> None:
    torch.manual_seed(0)
    state = published()
    state["_fc.bias"] = torch.randn(1000)
    torch.save(state, package)
    net: Any = lite0.network()
    assert not net.training
    assert torch.equal(net.classifier.bias, state["_fc.bias"])


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lite0, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ConfigError, match=r"quantfix\[lite0\]"):
        lite0.network()


def test_another_file_is_refused(package: Path) -> None:
    torch.save({"fc.weight": torch.ones(2)}, package)
    with pytest.raises(ConfigError, match="is not EfficientNet-Lite0"):
        lite0.network()
