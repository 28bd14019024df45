"""The table of bad inputs, files: images, tables, archives, annotations, weights."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.search.refused import Bad, check

PIXELS = {"size": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}
X = np.random.default_rng(0).normal(size=(20, 3, 16, 16)).astype(np.float32)
Y = np.arange(20) % 5


def images(folder: Path, count: int = 12) -> None:
    (folder / "set" / "a").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "set" / "a" / f"{i}.png")


def corrupt(folder: Path) -> None:
    images(folder)
    for name in ("3.png", "4.png"):
        (folder / "set" / "a" / name).write_bytes(b"no image")


def table(text: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        images(folder)
        (folder / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def archive(**arrays: Any) -> Callable[[Path], None]:
    return lambda folder: np.savez(folder / "d.npz", **arrays)


def cut(folder: Path) -> None:
    archive(x=X, y=Y)(folder)
    content = (folder / "d.npz").read_bytes()
    (folder / "d.npz").write_bytes(content[: len(content) // 2])


def flipped(folder: Path) -> None:
    archive(x=X, y=Y)(folder)
    content = bytearray((folder / "d.npz").read_bytes())
    content[2000:2100] = bytes(100)
    (folder / "d.npz").write_bytes(bytes(content))


def annotated(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        images(folder)
        entry = {"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4]}
        content = {
            "images": [
                {
                    "id": i,
                    "file_name": f"a/{i}.png",
                    "width": 20,
                    "height": changes.get("height", 20),
                }
                for i in range(12)
            ],
            "annotations": [entry | {k: v for k, v in changes.items() if k in entry}],
            "categories": [{"id": 1, "name": "one"}],
        }
        (folder / "a.json").write_text(json.dumps(content))

    return write


def labels(text: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        images(folder)
        (folder / "labels").mkdir()
        (folder / "labels" / "0.txt").write_bytes(text)

    return write


class Code:
    """Runs a command where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "ran"),)


def pickled(folder: Path) -> None:
    (folder / "w.pt").write_bytes(pickle.dumps(Code(folder)))


def saved(folder: Path) -> None:
    torch.save({"state_dict": {"a": Code(folder)}}, folder / "w.pt")


def nothing(folder: Path) -> None:
    (folder / "w.pt").write_bytes(b"")


def other(folder: Path) -> None:
    torch.save({"a": torch.ones(2)}, folder / "w.pt")


FOLDER = {"data": {"imagefolder": "set", **PIXELS}}
CSV = {"data": {"csv": "t.csv", "images": "set", **PIXELS}}
NPZ = {"data": {"npz": "d.npz"}}
DETECTOR = {"task": "detection", "postprocess": {"factory": "wrong:Decode", "args": {"kind": ""}}}
COCO = {"data": {"coco": "a.json", "images": "set", "size": 16}, **DETECTOR}
YOLO = {"data": {"yolo": "labels", "images": "set", "size": 16}, **DETECTOR}
VIDEO = {"task": "video", **CSV}
TIMM = {"model": {"timm": "test_vit", "weights": "w.pt"}}

FILES = [
    Bad(
        "no config",
        ("none.yaml: cannot be read: No such file",),
        words=("check", "HERE/none.yaml"),
    ),
    Bad("config is a folder", ("cannot be read: Is a directory",), words=("check", "HERE")),
    Bad("no folder", ("data.imagefolder: no such folder:",), FOLDER),
    Bad("no images", ("holds no images (.bmp,",), FOLDER, lambda d: (d / "set").mkdir()),
    Bad(
        "corrupt images",
        ("images cannot be read: ", ".png: cannot identify image file"),
        FOLDER,
        corrupt,
    ),
    Bad(
        "all calibrate",
        ("12 images, 12 to calibrate: too few",),
        {"data": {"imagefolder": "set", "calibration": 12, **PIXELS}},
        images,
    ),
    Bad(
        "no preprocessing",
        ("bad.yaml: data: missing size, mean, std",),
        {"data": {"imagefolder": "set"}},
        images,
    ),
    Bad("no table", ("data.csv: cannot be read:",), CSV),
    Bad(
        "table of other columns",
        ("t.csv:1: no column file; columns: ['name']",),
        CSV,
        table("name\n"),
    ),
    Bad("empty table", ("t.csv: lists no images",), CSV, table("file,label\n")),
    Bad(
        "label of the table",
        ("t.csv:3: label is no class index: 'cat'",),
        CSV,
        table("file,label\na/0.png,0\na/1.png,cat\n"),
    ),
    Bad(
        "table without files",
        ("images cannot be read: ", "No such file"),
        CSV,
        table("file,label\n" + "".join(f"b/{i}.png,0\n" for i in range(8))),
    ),
    Bad("table in bytes", ("data.csv: cannot be read:", "utf-8"), CSV, table(b"file\n\xff\xfe\n")),
    Bad(
        "endless field",
        ("data.csv: cannot be read:", "field larger than"),
        CSV,
        table('file\n"' + "a" * 200_000 + '"\n'),
    ),
    Bad("archive is missing", ("data.npz: cannot be read:", "No such file"), NPZ),
    Bad(
        "no archive",
        ("d.npz: damaged, or no .npz archive",),
        NPZ,
        lambda d: (d / "d.npz").write_bytes(b"xx"),
    ),
    Bad(
        "empty archive",
        ("d.npz: damaged, or no .npz archive",),
        NPZ,
        lambda d: (d / "d.npz").write_bytes(b""),
    ),
    Bad("half an archive", ("d.npz: damaged, or no .npz archive",), NPZ, cut),
    Bad("flipped bits", ("data.npz: cannot be read:", "CRC-32"), NPZ, flipped),
    Bad(
        "objects",
        ("Object arrays cannot be loaded",),
        NPZ,
        archive(x=np.array([{}], dtype=object)),
    ),
    Bad("no x", ("d.npz: no array x; arrays: ['z']",), NPZ, archive(z=X)),
    Bad(
        "shape of x",
        ("x must be float (N, C, H, W) or uint8 (N, H, W, C): float32 of shape (20, 3)",),
        NPZ,
        archive(x=X[:, :, 0, 0]),
    ),
    Bad(
        "y of another length",
        ("y must be 20 integers: int64 of shape (4,)",),
        NPZ,
        archive(x=X, y=Y[:4]),
    ),
    Bad(
        "NaN in x",
        ("d.npz: x has values that are not finite",),
        NPZ,
        archive(x=np.full_like(X, np.nan), y=Y),
    ),
    Bad("one sample", ("1 images, 0 to calibrate: too few",), NPZ, archive(x=X[:1], y=Y[:1])),
    Bad(
        "y out of range",
        ("target outside the network's 5 classes, 0 to 4: 104",),
        NPZ,
        archive(x=X, y=Y + 100),
    ),
    Bad(
        "annotations are no JSON",
        ("data.coco: a.json: not JSON:",),
        COCO,
        lambda d: (images(d), (d / "a.json").write_text("{")),
    ),
    Bad(
        "annotations are nested",
        ("data.coco: a.json: not JSON:", "recursion"),
        COCO,
        lambda d: (images(d), (d / "a.json").write_text("[" * 100_000)),
    ),
    Bad(
        "annotations of another kind",
        ("data.coco: a.json: not COCO's format: KeyError: 'images'",),
        COCO,
        lambda d: (images(d), (d / "a.json").write_text("{}")),
    ),
    Bad(
        "box of two numbers",
        ("a/0.png: bbox is not x, y, w, h: [1, 2]",),
        COCO,
        annotated(bbox=[1, 2]),
    ),
    Bad(
        "unknown category",
        ("a/0.png: category_id not among the categories: 9",),
        COCO,
        annotated(category_id=9),
    ),
    Bad(
        "image without height",
        ("width and height must be above 0: 20 x 0",),
        COCO,
        annotated(height=0),
    ),
    Bad("no labels", ("data.yolo: no such folder:",), YOLO, images),
    Bad(
        "words in labels",
        ("0.txt:1: could not convert string to float: 'a'",),
        YOLO,
        labels(b"0 a b c d\n"),
    ),
    Bad(
        "labels in pixels",
        ("0.txt:1: expected class cx cy w h as fractions",),
        YOLO,
        labels(b"0 15 20 100 100\n"),
    ),
    Bad(
        "labels not finite",
        ("0.txt:2: expected class cx cy w h",),
        YOLO,
        labels(b"0 0.5 0.5 0.1 0.1\n0 nan 0.5 0.5 0.5\n"),
    ),
    Bad(
        "labels in bytes",
        ("data.yolo: cannot be read:", "not text in UTF-8"),
        YOLO,
        labels(b"\xff\xfe"),
    ),
    Bad(
        "frame label",
        ("t.csv:2: label is not 0, 1 or empty: '7'",),
        VIDEO,
        table("file,label\na/0.png,7\n"),
    ),
    Bad(
        "missing frame",
        ("1 frames are missing, such as",),
        VIDEO,
        table("file,label\na/99.png,1\n"),
    ),
    Bad("no frames", ("t.csv: lists no frames",), VIDEO, table("file,label\n")),
    Bad("no weights", ("model.weights: no such file:",), TIMM),
    Bad("empty weights", ("w.pt: not readable as a file of tensors",), TIMM, nothing),
    Bad("weights of another network", ("w.pt does not fit the model: lacks",), TIMM, other),
    Bad(
        "timm arguments",
        ("model: args do not fit test_vit", "bogus"),
        {"model": {"timm": "test_vit", "weights": "w.pt", "args": {"bogus": 1}}},
    ),
]
CODE = [
    Bad(
        "a pickle",
        ("w.pt: holds code or objects", "refused, as loading would run it"),
        TIMM,
        pickled,
    ),
    Bad("a pickle in a checkpoint", ("w.pt: holds code or objects (posix.mkdir)",), TIMM, saved),
]


@pytest.mark.parametrize("bad", FILES, ids=lambda bad: bad.name)
def test_it_is_refused_in_words(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("bad", CODE, ids=lambda bad: bad.name)
def test_code_in_weights_is_not_run(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, tmp_path, monkeypatch, capsys)
    assert not (tmp_path / "ran").exists()
    if bad.name == "a pickle":
        pickle.loads((tmp_path / "w.pt").read_bytes())
        assert (tmp_path / "ran").exists()  # it would have been
