from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from search.config.schema import Config, ConfigError, load_config
from search.data.datasets import batches, load_data
from search.data.model import load_model

PIXELS = "size: 8, mean: [0.5, 0.25, 0], std: [1, 0.5, 2], crop: 1"

Written = Callable[..., Config]


def model_fault(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(config)
    return str(caught.value)


def data_fault(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        load_data(config)
    return str(caught.value)


def save_images(folder: Path, names: list[str], size: tuple[int, int] = (12, 9)) -> None:
    rng = np.random.default_rng(len(names))
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)


# Factories


def test_a_factory_beside_the_config_gives_the_model(config: Written) -> None:
    code = (
        "from torch import nn\nfrom mine_width import width\n"
        "def net(depth=1): return nn.Sequential(*[nn.Linear(width, 3).double()] * depth).train()"
    )
    cfg = config(model='model: {factory: "mine:net", args: {depth: 2}}', code=code)
    (cfg.path.parent / "mine_width.py").write_text("width = 5")
    model = load_model(cfg)
    assert len(model) == 2  # pyright: ignore[reportArgumentType]
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_two_configs_with_a_module_of_one_name_get_their_own(
    config: Written, tmp_path: Path
) -> None:
    code = "from torch import nn\ndef net(): return nn.Linear({}, 1)"
    sizes = []
    for size in (2, 3, 2):
        folder = tmp_path / f"project{size}"
        folder.mkdir(exist_ok=True)
        (folder / "mine.py").write_text(code.format(size))
        file = folder / "run.yaml"
        file.write_text(config().path.read_text())
        sizes.append(load_model(load_config(file)).in_features)
    assert sizes == [2, 3, 2]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def nett(): pass", "model: factory mine:net: mine has no callable net; did you mean n"),
        ("net = 3", "model: factory mine:net: mine has no callable net"),
        ("def net(depth): pass", "factory mine:net: args do not fit (depth): missing a required"),
        ("def net(): return 3", "model: factory mine:net: returned no nn.Module: int"),
        ("def net():\n  x = {}\n  return x['a']", "mine:net: KeyError at mine.py:3: 'a'"),
        ("import torch\ndef net():\n  torch.load('none.pt')", "FileNotFoundError at mine.py:3: "),
        ("import no_such\n", "mine:net: ModuleNotFoundError at mine.py:1: No module named 'no_su"),
        ("def net(:\n", "model: factory mine:net: SyntaxError at mine.py:1: invalid syntax"),
        ("1/0\n", "model: factory mine:net: ZeroDivisionError at mine.py:1: division by zero"),
    ],
)
def test_a_factory_that_fails_is_named_with_the_users_line(
    config: Written, code: str, message: str
) -> None:
    assert message in model_fault(config(code=code))


def test_the_users_exception_is_the_cause(config: Written) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(config(code="1/0"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_missing_module_is_named_with_the_folder(config: Written, tmp_path: Path) -> None:
    assert f"no module mine, neither in {tmp_path} nor installed" in model_fault(config())


def test_a_users_file_may_not_take_the_packages_name(config: Written, tmp_path: Path) -> None:
    (tmp_path / "search.py").write_text("def net(): pass")
    fault = model_fault(config(model='model: {factory: "search:net"}'))
    assert "search.py: the name search is quantfix's own; rename the file" in fault


DATA = """
import torch
class Data: pass
def data(calibration=None, evaluation=None):
    d = Data()
    d.calibration = calibration if calibration is not None else [torch.zeros(1, 2, 2)] * 3
    d.evaluation = evaluation if evaluation is not None else [(torch.ones(1, 2, 2), 1)] * 2
    return d
def pairs(): return data(calibration=[(torch.zeros(1), 1)])
def triples(): return data(evaluation=[(torch.zeros(1), 1, 2)])
def doubles(): return data(evaluation=[(torch.zeros(1).double(), 1)])
def numbers(): return data(calibration=[1.0])
def empty(): return data(evaluation=[])
def stream(): return data(evaluation=iter([1]))
def nothing(): return None
class Broken:
    def __len__(self): return 3
    def __getitem__(self, i):
        raise OSError("no such image")
def broken(): return data(calibration=Broken())
"""


def test_a_factory_gives_the_splits(config: Written) -> None:
    data = load_data(config('{factory: "mine:data"}', code=DATA))
    assert len(data.calibration) == 3
    assert data.evaluation[1][1] == 1
    assert data.training is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pairs", "data.calibration: must yield inputs alone: yields 2 values"),
        ("triples", "data.evaluation: must yield (input, target) pairs: yields 3 values"),
        ("doubles", "inputs must be float32 tensors (C, H, W): tensor of torch.float64"),
        ("numbers", "data.calibration: inputs must be float32 tensors (C, H, W): float"),
        ("empty", "data.evaluation: empty"),
        ("stream", "data.evaluation: no map-style data set (len() and []): list_iterator"),
        ("nothing", "mine:nothing: result has no calibration and no evaluation: NoneType"),
        ("broken", "data: sample 0: OSError at mine.py:19: no such image"),
    ],
)
def test_splits_of_another_form_are_refused(config: Written, name: str, message: str) -> None:
    assert message in data_fault(config(f'{{factory: "mine:{name}"}}', code=DATA))


# timm


def test_weights_from_a_file(config: Written, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(1)
    wanted = timm.create_model("test_vit", num_classes=4)
    safetensors.torch.save_model(wanted, str(tmp_path / "w.safetensors"))
    torch.save({"state_dict": wanted.state_dict()}, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        args = f"{{timm: test_vit, weights: {file}, args: {{num_classes: 4}}}}"
        model = load_model(config(model=f"model: {args}"))
        for key, value in wanted.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)


def test_unusable_weights_are_refused(config: Written, tmp_path: Path) -> None:
    def fault(file: str) -> str:
        return model_fault(config(model=f"model: {{timm: test_vit, weights: {file}}}"))

    assert "model.weights: no such file:" in fault("none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"abc")
    assert "not readable as a file of tensors" in fault("broken.safetensors")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    assert "holds code or objects (torch.nn.modules.linear.Linear)" in fault("module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds no state dict" in fault("list.pt")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    assert "other.safetensors does not fit the model: lacks" in fault("other.safetensors")


def test_an_unknown_timm_model_is_named_with_near_ones(config: Written) -> None:
    fault = model_fault(config(model="model: {timm: mobilenetv2_10}"))
    assert "model.timm: unknown to timm" in fault
    assert "mobilenetv2_100" in fault


def test_weights_that_cannot_be_fetched_are_one_message(
    config: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, pretrained: bool, **_: Any) -> nn.Module:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr("timm.create_model", offline)
    fault = model_fault(config(model="model: {timm: efficientnet_lite0}"))
    assert fault == (
        "model: efficientnet_lite0: the pretrained weights could not be fetched "
        "(ConnectionError: no route to the hub); give a file instead: weights: FILE.safetensors"
    )


# Built-in images


def test_an_image_becomes_what_numpy_says(config: Written, tmp_path: Path) -> None:
    save_images(tmp_path / "set", [f"{c}/{i}.png" for c in "ba" for i in range(4)], size=(8, 8))
    data = load_data(config(f"{{imagefolder: set, calibration: 2, {PIXELS}}}"))
    assert len(data.calibration) == 2
    assert len(data.evaluation) == 6
    seen = set()
    for i in range(6):
        x, label = data.evaluation[i]
        file = data.evaluation.files[i]  # pyright: ignore[reportAttributeAccessIssue]
        assert label == "ab".index(file.parent.name)
        pixels = np.asarray(Image.open(file)).transpose(2, 0, 1) / 255
        wanted = (pixels - np.reshape([0.5, 0.25, 0], (3, 1, 1))) / np.reshape(
            [1, 0.5, 2], (3, 1, 1)
        )
        np.testing.assert_allclose(x.numpy(), wanted, atol=1e-6)
        seen.add(file)
    assert seen.isdisjoint(data.calibration.files)  # pyright: ignore[reportAttributeAccessIssue]


def test_the_split_is_fixed_by_the_seed(config: Written, tmp_path: Path) -> None:
    save_images(tmp_path / "set", [f"a/{i:02}.png" for i in range(20)])

    def files(extra: str) -> list[Path]:
        data = load_data(config(f"{{imagefolder: set, {PIXELS}{extra}}}"))
        assert len(data.calibration) == 5
        return data.evaluation.files  # pyright: ignore[reportAttributeAccessIssue]

    assert files("") == files(", seed: 0")
    assert files("") != files(", seed: 1")
    assert files(", evaluation: 4") == files("")[:4]
    assert files("") != sorted(files(""))


def test_a_flat_folder_has_no_labels(config: Written, tmp_path: Path) -> None:
    save_images(tmp_path / "set", [f"{i}.jpg" for i in range(4)])
    data = load_data(config(f"{{imagefolder: set, {PIXELS}}}"))
    assert data.evaluation[0].shape == (3, 8, 8)


def test_one_mean_reads_gray(config: Written, tmp_path: Path) -> None:
    save_images(tmp_path / "set", [f"{i}.png" for i in range(4)])
    data = load_data(config("{imagefolder: set, size: 8, mean: [0], std: [1]}"))
    assert data.evaluation[0].shape == (1, 8, 8)


def test_timm_says_how_its_models_read_images(config: Written, tmp_path: Path) -> None:
    from timm.data.transforms_factory import create_transform

    save_images(tmp_path / "set", [f"{i}.png" for i in range(4)], size=(300, 260))
    # size 224, bicubic, cropped to 0.875, ImageNet mean and std
    data = load_data(config("{imagefolder: set}", model="model: {timm: efficientnet_lite0}"))
    wanted: Any = create_transform(
        224,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_pct=0.875,
    )
    file = data.evaluation.files[0]  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(data.evaluation[0], wanted(Image.open(file)))


def test_preprocessing_of_another_model_must_be_given(config: Written, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    fault = data_fault(config("{imagefolder: set, mean: [0]}"))
    assert "run.yaml: data: missing size, std: how an image becomes the input" in fault


def test_missing_and_empty_folders_are_refused(config: Written, tmp_path: Path) -> None:
    cfg = config(f"{{imagefolder: set, {PIXELS}}}")
    assert data_fault(cfg) == f"data.imagefolder: no such folder: {tmp_path / 'set'}"
    (tmp_path / "set").mkdir()
    assert "holds no images (.bmp, .jpeg" in data_fault(cfg)
    save_images(tmp_path / "set", ["a.png"])
    assert "1 images, 0 to calibrate: too few" in data_fault(cfg)


def test_a_few_corrupt_images_are_left_out_and_named(
    config: Written, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_images(tmp_path / "set", [f"a/{i:03}.jpg" for i in range(230)], size=(40, 40))
    order = np.random.default_rng(0).permutation(230)  # two of the images that evaluate
    names = [f"{i:03}.jpg" for i in order[[150, 160]]]
    whole = (tmp_path / "set" / "a" / names[0]).read_bytes()
    (tmp_path / "set" / "a" / names[0]).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "set" / "a" / names[1]).write_bytes(b"not an image")
    cfg = config(f"{{imagefolder: set, calibration: 30, {PIXELS}}}")
    data = load_data(cfg)
    assert len(data.evaluation) == 198
    assert len(list(batches(data.evaluation, 50))) == 4
    assert "2 of 200 images cannot be read" in caplog.text
    assert all(name in caplog.text for name in names)

    (tmp_path / "set" / "a" / f"{order[170]:03}.jpg").write_bytes(b"")
    assert "3 of 200 images cannot be read: " in data_fault(cfg)


def test_a_table_of_files(config: Written, tmp_path: Path) -> None:
    save_images(tmp_path / "pictures", [f"{i}.png" for i in range(8)])
    rows = "".join(f"{i}.png,{7 - i}\n" for i in range(8))
    (tmp_path / "labels.csv").write_text("file,label\n" + rows)
    data = load_data(config(f"{{csv: labels.csv, images: pictures, {PIXELS}}}"))
    files = data.evaluation.files  # pyright: ignore[reportAttributeAccessIssue]
    assert [data.evaluation[i][1] for i in range(6)] == [7 - int(f.stem) for f in files]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "data.csv: cannot be read:"),
        ("name,label\na,1\n", "labels.csv:1: no column file; columns: ['name', 'label']"),
        ("file,label\na.png,cat\n", "labels.csv:2: label is no class index: 'cat'"),
        ("file,label\na.png\n", "labels.csv:2: label is no class index: None"),
        ("file,label\n,1\n", "labels.csv:2: no file name"),
        ("file\na.png\nb.png\n", "2 images, 0 to calibrate"),
        ("file\na\nb\nc\nd\n", "1 of 1 images cannot be read: "),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    config: Written, tmp_path: Path, text: str | None, message: str
) -> None:
    (tmp_path / "pictures").mkdir()
    if text is not None:
        (tmp_path / "labels.csv").write_text(text)
    cfg = config(f"{{csv: labels.csv, images: pictures, {PIXELS}}}")
    assert message in data_fault(cfg)


def test_float_arrays_are_read_as_they_are(config: Written, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 2, 3, 5)), np.arange(12)
    np.savez(tmp_path / "set.npz", x=x, y=y)
    data = load_data(config("{npz: set.npz, calibration: 4}"))
    assert (len(data.calibration), len(data.evaluation)) == (4, 8)
    for i in range(8):
        image, label = data.evaluation[i]
        np.testing.assert_array_equal(image.numpy(), x[label].astype(np.float32))


def test_byte_arrays_are_images(config: Written, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x=x)
    data = load_data(config("{npz: set.npz, size: 8, mean: [0, 0, 0], std: [1, 1, 1], crop: 1}"))
    order = np.random.default_rng(0).permutation(4)
    wanted = x[order[1]].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(data.evaluation[0].numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": np.ones(3)}, "set.npz: no array x; arrays: ['a']"),
        ({"x": np.ones((4, 2))}, "x must be float (N, C, H, W) or uint8"),
        ({"x": np.full((4, 1, 2, 2), np.nan)}, "x has values that are not finite"),
        ({"x": np.ones((4, 1, 2, 2)), "y": np.ones(3, int)}, "y must be 4 integers: int64 of sh"),
        ({"x": np.ones((4, 1, 2, 2)), "y": np.ones(4)}, "y must be 4 integers: float64 of shape"),
    ],
)
def test_archives_that_do_not_fit_are_refused(
    config: Written, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "set.npz", **content)
    assert message in data_fault(config("{npz: set.npz}"))


def test_an_archive_of_objects_is_not_unpickled(config: Written, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x=np.array([{}, {}], dtype=object))
    assert "data.npz: cannot be read" in data_fault(config("{npz: set.npz}"))
    (tmp_path / "set.npz").unlink()
    assert "data.npz: cannot be read" in data_fault(config("{npz: set.npz}"))


# Real networks


@pytest.mark.assets
def test_the_assets_load(assets: Path) -> None:
    cfg = load_config(assets / "mcunet.yaml")
    data = load_data(cfg)
    assert (len(data.calibration), len(data.evaluation)) == (100, 550)
    with torch.inference_mode():
        logits = load_model(cfg)(next(iter(batches(data.calibration, 2))))
    assert logits.shape == (2, 1000)
