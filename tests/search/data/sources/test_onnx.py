"""Networks in files: ONNX, and programs of torch.export, of which nothing but tensors is read."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from search.config.schema import Config, ConfigError
from search.data.model import load_model
from search.data.sources import preprocessing_of

Written = Callable[..., Config]


def onnx_file(path: Path, size: tuple[int | str, int | str] = (8, 12), op: str = "Relu") -> Path:
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
            helper.make_node(op, ["a"], ["b"]),
            helper.make_node("GlobalAveragePool", ["b"], ["c"]),
            helper.make_node("Flatten", ["c"], ["y"]),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, *size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, str(path))
    return path


def test_an_onnx_file_is_the_network_that_onnx_runtime_runs(
    config: Written, tmp_path: Path
) -> None:
    file = onnx_file(tmp_path / "net.onnx")
    cfg = config(model="model: {onnx: net.onnx}")
    x = torch.randn(5, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    (wanted,) = onnxruntime.InferenceSession(str(file)).run(None, {"x": x.numpy()})
    model = load_model(cfg)
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.as_tensor(wanted), rtol=1e-4, atol=1e-5)
    assert preprocessing_of(cfg) == {"size": (8, 12)}


def test_a_size_that_the_file_leaves_open_is_given(config: Written, tmp_path: Path) -> None:
    onnx_file(tmp_path / "net.onnx", ("h", "w"))
    cfg = config(model="model: {onnx: net.onnx, args: {shape: [3, 16, 16]}}")
    assert load_model(cfg)(torch.zeros(2, 3, 16, 16)).shape == (2, 4)
    assert preprocessing_of(cfg) == {"size": 16}
    for read in (load_model, preprocessing_of):
        with pytest.raises(ConfigError, match=r"model\.onnx: input x: its size is open in the"):
            read(config(model="model: {onnx: net.onnx}"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{onnx: none.onnx}", r"model\.onnx: no such file"),
        ("{onnx: bad.onnx}", r"model\.onnx: bad\.onnx: not readable as an ONNX model"),
        ("{onnx: odd.onnx}", r"operators that cannot be imported: Det \(1\)"),
        ("{onnx: net.onnx, args: {shape: [3, 9, 9]}}", "the file says 8, given is 9"),
        (
            "{onnx: net.onnx, args: {size: 3}}",
            r"model\.args\.size: unknown for onnx; known: shape",
        ),
        ("{exported: none.pt2}", r"model\.exported: no such file"),
        ("{exported: bad.onnx}", r"model\.exported: bad\.onnx: no archive of torch\.export\.save"),
        ("{exported: other.zip}", r"model\.exported: other\.zip: no exported program"),
    ],
)
def test_files_that_hold_no_network_are_refused(
    config: Written, tmp_path: Path, model: str, message: str
) -> None:
    onnx_file(tmp_path / "net.onnx")
    onnx_file(tmp_path / "odd.onnx", op="Det")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("other/readme", "hello")
    with pytest.raises(ConfigError, match=message):
        load_model(config(model=f"model: {model}"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu().mean((2, 3))


def exported_file(path: Path) -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return net


@pytest.mark.parametrize("name", ["net.pt2", "my_custom_obj.pt2"])
def test_an_exported_program_is_the_network_that_was_exported(
    config: Written, tmp_path: Path, name: str
) -> None:
    net = exported_file(tmp_path / name)
    model = load_model(config(model=f"model: {{exported: {name}}}"))
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), net(x))


class Harm:
    """What a hostile pickle does when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def repacked(source: Path, target: Path, changes: dict[str, bytes]) -> None:
    """A copy of an archive with files that are added, or others in their place."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        (root,) = {n.partition("/")[0] for n in old.namelist()}
        for name in old.namelist():
            if name.partition("/")[2] not in changes:
                new.writestr(name, old.read(name))
        for name, content in changes.items():
            new.writestr(f"{root}/{name}", content)


@pytest.mark.parametrize("name", ["custom_obj_0", "opaque_obj_0", "CUSTOM_OBJ_0", "Opaque_Obj_7"])
def test_an_archive_with_objects_is_refused(config: Written, tmp_path: Path, name: str) -> None:
    exported_file(tmp_path / "net.pt2")
    harm = pickle.dumps(Harm(tmp_path / "harm"))
    repacked(tmp_path / "net.pt2", tmp_path / "bad.pt2", {f"data/constants/{name}": harm})
    with pytest.raises(ConfigError, match=rf"holds an object \(.*{name}\): refused"):
        load_model(config(model="model: {exported: bad.pt2}"))
    assert not (tmp_path / "harm").exists()


def test_an_archive_with_a_pickle_that_runs_code_is_refused(
    config: Written, tmp_path: Path
) -> None:
    exported_file(tmp_path / "net.pt2")
    torch.save(Harm(tmp_path / "harm"), tmp_path / "harm.pt")
    harm = (tmp_path / "harm.pt").read_bytes()
    inputs = {"data/sample_inputs/model.pt": harm}
    repacked(tmp_path / "net.pt2", tmp_path / "bad.pt2", inputs)
    # what is refused would have been run
    torch.load(tmp_path / "harm.pt", weights_only=False)
    (tmp_path / "harm").unlink()
    before = torch.load
    with pytest.raises(ConfigError, match="holds code or objects, not only tensors: refused"):
        load_model(config(model="model: {exported: bad.pt2}"))
    assert not (tmp_path / "harm").exists()
    assert torch.load is before
