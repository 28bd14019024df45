"""The config that ``quantfix fix NET.onnx --images DIR`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from onnx import TensorProto, helper

from search.cli.from_model import IMAGENET_MEAN, IMAGENET_STD, TRIALS, config_of_model
from search.config.schema import ConfigError


def network(path: Path, *shape: int | str, inputs: int = 1) -> Path:
    """A file that is read for its inputs alone."""
    values = [
        helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["n", *shape])
        for i in range(inputs)
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", *shape])
    nodes = [helper.make_node("Sum", [v.name for v in values], ["y"])]
    made = helper.make_model(
        helper.make_graph(nodes, "net", values, [out]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.save(made, str(path))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def test_a_config_is_written_and_read(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = network(tmp_path / "net.onnx", 3, 32, 32)
    cfg = config_of_model(model, images, tmp_path / "run")
    assert cfg.path == tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(cfg.path.read_text()) == {
        "task": "unlabelled",
        "model": {"onnx": str(model)},
        "data": {
            "imagefolder": str(images),
            "size": 32,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "crop": 1.0,
        },
        "target": "onnxruntime",
        "search": {"trials": TRIALS},
    }
    said = " ".join(capsys.readouterr().out.split())
    assert "assumed; --mean and --std say otherwise" in said
    # next time the images need not be given
    assert config_of_model(model, None, tmp_path / "run") == cfg


def test_options_are_what_the_config_says(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = network(tmp_path / "net.onnx", 3, "h", "w")
    cfg = config_of_model(
        model, images, tmp_path / "run", "tflite", "3,24,40", "0,0.5,1", "1,0.25,2"
    )
    assert cfg.target == "tflite"
    assert cfg.model.args == {"shape": [3, 24, 40]}
    assert (cfg.data.size, cfg.data.crop) == ((24, 40), None)
    assert (cfg.data.mean, cfg.data.std) == ((0, 0.5, 1), (1, 0.25, 2))
    assert capsys.readouterr().out == ""


def test_one_channel_is_normalized_by_the_mean_of_three(tmp_path: Path, images: Path) -> None:
    model = network(tmp_path / "net.onnx", 1, 16, 16)
    cfg = config_of_model(model, images, tmp_path / "run", quiet=True)
    assert cfg.data.mean == pytest.approx((sum(IMAGENET_MEAN) / 3,))
    assert cfg.data.std == pytest.approx((sum(IMAGENET_STD) / 3,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "3,a,32"}, "--shape: must be numbers separated by commas: 3,a,32"),
        ({"shape": ""}, "--shape: must be numbers"),
        ({"shape": "3,nan,32"}, "--shape: must be numbers"),
        ({"shape": "3,inf,32"}, "--shape: must be numbers"),
        ({"shape": "3,32.5,32"}, "--shape: must be whole numbers above 0: 3,32.5,32"),
        ({"shape": "3,0,32"}, "--shape: must be whole numbers above 0"),
        ({"shape": "3,-32,32"}, "--shape: must be whole numbers above 0"),
        ({"shape": "3,16,16"}, "the file says 32, given is 16"),
        ({"shape": "32,32"}, "must have one less"),
        ({"mean": "0.5"}, "--mean: 1 numbers for 3 channels"),
        ({"mean": ""}, "--mean: must be numbers"),
        ({"std": "1,1,1,1"}, "--std: 4 numbers for 3 channels"),
        ({"std": "1,1,nan"}, "--std: must be numbers"),
        ({"std": "1,0,1"}, "std must be above 0"),
        ({"target": "tensort"}, "target: unknown: 'tensort'; did you mean 'tensorrt'"),
    ],
)
def test_options_that_cannot_be_used_are_refused_and_nothing_is_left(
    tmp_path: Path, images: Path, options: dict[str, Any], message: str
) -> None:
    model = network(tmp_path / "net.onnx", 3, 32, 32)
    config = tmp_path / "run" / "config.yaml"
    with pytest.raises(ConfigError, match=message):
        config_of_model(model, images, tmp_path / "run", quiet=True, **options)
    assert not config.exists()
    config_of_model(model, images, tmp_path / "run", quiet=True)
    before = config.read_bytes()
    with pytest.raises(ConfigError, match=message):
        config_of_model(model, images, tmp_path / "run", quiet=True, **options)
    assert config.read_bytes() == before


def test_options_are_not_ignored_where_a_config_is_there(tmp_path: Path, images: Path) -> None:
    model = network(tmp_path / "net.onnx", 3, 32, 32)
    config_of_model(model, images, tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match=r"go with --images; .*config\.yaml is there: edit it"):
        config_of_model(model, None, tmp_path / "run", target="tflite")


def test_files_and_folders_that_cannot_be_used_are_refused(tmp_path: Path, images: Path) -> None:
    def fault(model: Path, folder: Path | None = images) -> str:
        with pytest.raises(ConfigError) as caught:
            config_of_model(model, folder, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    good = network(tmp_path / "net.onnx", 3, 32, 32)
    assert "--images DIR: missing" in fault(good, None)
    assert "--images: no such folder" in fault(good, tmp_path / "none")
    assert "--images: no such folder" in fault(good, good)
    assert "model.onnx: no such file" in fault(tmp_path / "none.onnx")
    assert "size is open in the file" in fault(network(tmp_path / "open.onnx", 3, "h", "w"))
    for i, shape in enumerate([(3, 32), (4, 32, 32)]):
        assert "no single image (C, H, W)" in fault(network(tmp_path / f"{i}.onnx", *shape))
    two = network(tmp_path / "two.onnx", 3, 8, 8, inputs=2)
    assert "reads (3, 8, 8), (3, 8, 8), no single image" in fault(two)
