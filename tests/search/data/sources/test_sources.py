"""Each key of ``model:`` has a file, each task too; torchvision's networks and how their images are prepared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision

from search.config.schema import Config, ConfigError, load_config
from search.data.model import load_model
from search.data.sources import MODEL_SOURCES, preprocessing_of
from search.tasks import TASKS, task

ROOT = Path(__file__).resolve().parents[4]
Written = Callable[..., Config]


def test_every_source_has_its_file_and_every_file_its_key() -> None:
    files = {p.stem.removeprefix("from_") for p in (ROOT / "search/data/sources").glob("from_*")}
    assert files == set(MODEL_SOURCES)
    for module in MODEL_SOURCES.values():
        assert callable(__import__(module, fromlist=["load"]).load)


def test_every_task_has_its_file() -> None:
    for name, module in TASKS.items():
        assert (ROOT / "search/tasks" / f"{name}.py").is_file()
        assert callable(__import__(module, fromlist=["make"]).make)


def test_a_network_of_torchvision_with_weights_of_a_file(config: Written, tmp_path: Path) -> None:
    torch.manual_seed(1)
    wanted = torchvision.models.squeezenet1_1(num_classes=4)
    safetensors.torch.save_model(wanted, str(tmp_path / "w.safetensors"))
    args = "{torchvision: squeezenet1_1, weights: w.safetensors, args: {num_classes: 4}}"
    model = load_model(config(model=f"model: {args}"))
    assert type(model) is type(wanted) and not model.training
    for key, value in wanted.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)


def test_images_are_prepared_as_the_trained_weights_want_it(config: Written) -> None:
    found = preprocessing_of(config(model="model: {torchvision: mobilenet_v2, weights: w.pth}"))
    preset = torchvision.models.MobileNet_V2_Weights.DEFAULT.transforms()
    assert (found["size"], found["mean"]) == (preset.crop_size[0], tuple(preset.mean))
    assert round(found["size"] / found["crop"]) == preset.resize_size[0]
    unknown = config(model="model: {torchvision: fasterrcnn_resnet50_fpn, weights: w.pth}")
    assert preprocessing_of(unknown) == {}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{torchvision: mobilenet_v22, weights: w.pth}", "did you mean mobilenet_v2"),
        ("{torchvision: mobilenet_v2, weights: none.pth}", "model.weights: no such file"),
        (
            "{torchvision: mobilenet_v2, weights: w.pth, args: {color: 1}}",
            "args do not fit mobilenet_v2",
        ),
    ],
)
def test_what_torchvision_does_not_have_is_said(config: Written, model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(config(model=f"model: {model}"))


def test_weights_that_cannot_be_fetched_are_one_message(
    config: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, **_: Any) -> None:
        raise OSError("no route to the host\nand more")

    monkeypatch.setattr("torchvision.models.get_model", offline)
    with pytest.raises(
        ConfigError, match=r"could not be fetched \(OSError: no route to the host\)"
    ):
        load_model(config(model="model: {torchvision: mobilenet_v2}"))


def test_a_metric_of_the_users_own_is_made_by_the_config(tmp_path: Path) -> None:
    (tmp_path / "metrics.py").write_text(
        "def error(outputs, targets, scale=1.0):\n"
        "    return scale * sum(abs(float(o) - float(t)) for o, t in zip(outputs, targets))\n"
    )
    file = tmp_path / "run.yaml"
    file.write_text(
        "task: custom\nmodel: {timm: resnet18}\ndata: {digits: 32}\n"
        'metric: {factory: "metrics:error", higher_is_better: false, args: {scale: 2.0}}\n'
    )
    found = task(load_config(file))
    assert (found.name, found.metric, found.higher_is_better) == ("custom", "error", False)
    assert found.score([torch.tensor([1.0, 2.0])], torch.tensor([0.0, 4.0])) == 6.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: custom\n", "task custom needs metric"),
        ("task: video\nmetric: {factory: 'a:b'}\n", "metric goes with task custom, not video"),
    ],
)
def test_a_metric_goes_with_task_custom(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{text}model: {{timm: resnet18}}\ndata: {{npz: a.npz}}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(file)
