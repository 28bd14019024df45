"""Names of classes: from the config, a file, beside YOLO's labels, COCO's categories, or a factory's result."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from search.config.schema import Config, ConfigError, load_config
from search.data.class_names import class_names


def given(folder: Path, names: Any = None, **source: Any) -> Config:
    data = (source or {"factory": "m:f"}) | ({} if names is None else {"names": names})
    content = {"task": "detection", "model": {"factory": "m:f"}, "data": data}
    content["postprocess"] = {"factory": "m:f"}
    file = folder / "run.yaml"
    file.write_text(json.dumps(content))
    return load_config(file)


def test_a_list_or_a_factory_s_attribute(tmp_path: Path) -> None:
    assert class_names(given(tmp_path, ["cat", "dog"])) == {0: "cat", 1: "dog"}
    assert class_names(given(tmp_path), SimpleNamespace(names={"3": "bird"})) == {3: "bird"}
    assert class_names(given(tmp_path), SimpleNamespace()) == {}
    assert class_names(given(tmp_path, ["a"]), SimpleNamespace(names=["b"])) == {0: "a"}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("n.yaml", "names: [cat, dog]"),
        ("n.yml", "names: {0: cat, 1: dog}"),
        ("n.yaml", "[cat, dog]"),
        ("n.txt", "cat\ndog\n"),
    ],
)
def test_a_file(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    assert class_names(given(tmp_path, file)) == {0: "cat", 1: "dog"}


@pytest.mark.parametrize("text", ["names: 3", "other: 1", "names: {a: b}", "a: [", "\0"])
def test_a_file_of_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "n.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"data\.names: .*n\.yaml"):
        class_names(given(tmp_path, "n.yaml"))


def test_beside_the_labels(tmp_path: Path) -> None:
    (tmp_path / "labels" / "val").mkdir(parents=True)
    source = {"yolo": "labels/val", "images": "images", "size": 32}
    assert class_names(given(tmp_path, **source)) == {}
    (tmp_path / "labels" / "data.yaml").write_text("train: elsewhere")  # passed over
    (tmp_path / "data.yaml").write_text("names: [cat]")
    assert class_names(given(tmp_path, **source)) == {0: "cat"}
    (tmp_path / "labels" / "val" / "classes.txt").write_text("dog\n")
    assert class_names(given(tmp_path, **source)) == {0: "dog"}
