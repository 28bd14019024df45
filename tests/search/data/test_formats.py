"""Data sets in the forms that people have them in, each written here and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from search.config.schema import Config, ConfigError, load_config
from search.data.datasets import Data, load_data

WIDTH, HEIGHT, COUNT = 40, 20, 8


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of 40 x 20 pixels, each of one gray, 10 times its number."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(COUNT):
        Image.new("RGB", (WIDTH, HEIGHT), (10 * i,) * 3).save(folder / f"{i}.png")
    return folder


def read(folder: Path, task: str, data: str, more: str = "") -> Data:
    file = folder / "run.yaml"
    text = (
        f"task: {task}\nmodel: {{factory: 'mine:build'}}\ndata: {{{data}, calibration: 2}}\n{more}"
    )
    file.write_text(text, encoding="utf-8")
    cfg: Config = load_config(file)
    return load_data(cfg)


def by_number(data: Data) -> dict[int, tuple[torch.Tensor, Any]]:
    """Samples by the gray of their image; an image is whole where it is of one gray."""
    found: dict[int, tuple[torch.Tensor, Any]] = {}
    for i in range(len(data.evaluation)):
        x, target = data.evaluation[i]
        assert x.std() < 1e-6
        found[round(float(x.mean()) * 25.5)] = (x, target)
    return found


def test_mask_folders_in_gray_with_a_palette_and_with_a_suffix(
    tmp_path: Path, images: Path
) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(COUNT):
        values = np.zeros((HEIGHT, WIDTH), np.uint8)
        values[:, WIDTH // 2 :] = i
        values[:2] = 255
        mask = Image.fromarray(values)
        if i % 2:
            mask.putpalette(list(range(256)) * 3)
        mask.save(masks / f"{i}{'_mask' if i == 3 else ''}.png")
    data = read(tmp_path, "segmentation", "masks: masks, images: images, size: [10, 20]")
    assert (len(data.calibration), len(data.evaluation)) == (2, COUNT - 2)
    for number, (x, mask) in by_number(data).items():
        assert tuple(x.shape) == (3, 10, 20)
        wanted = torch.zeros(10, 20, dtype=torch.int64)
        wanted[:, 10:] = number
        wanted[0] = 255
        assert torch.equal(mask, wanted)
    (masks / "5.png").unlink()
    with pytest.raises(ConfigError, match=r"data\.masks: no mask for 5\.png"):
        read(tmp_path, "segmentation", "masks: masks, images: images, size: 10")
    for i in range(COUNT):
        Image.new("RGB", (WIDTH, HEIGHT)).save(masks / f"{i}.png")
    (masks / "3_mask.png").unlink()
    with pytest.raises(ConfigError, match=r"\d\.png: colors \(RGB\)"):
        read(tmp_path, "segmentation", "masks: masks, images: images, size: 10")
    with pytest.raises(ConfigError, match="go with task segmentation, not detection"):
        read(
            tmp_path,
            "detection",
            "masks: masks, images: images, size: 10",
            "postprocess: {factory: 'a:b'}",
        )


def coco(folder: Path, annotations: list[dict[str, Any]], **category: Any) -> None:
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT}
            for i in range(COUNT)
        ],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cup", **category}, {"id": 3, "name": "cat", **category}],
    }
    (folder / "coco.json").write_text(json.dumps(content))


def test_masks_of_coco_small_on_large_and_crowds_left_out(tmp_path: Path, images: Path) -> None:
    runs = np.zeros((HEIGHT, WIDTH), np.uint8)
    runs[10:, 30:] = 1
    flat = runs.T.reshape(-1)  # run lengths go down the columns, zeros first
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    counts = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    left = [0, 0, 20, 0, 20, 20, 0, 20]
    corner = [0, 0, 10, 0, 10, 10, 0, 10]
    rows = [
        {"segmentation": [corner], "category_id": 7, "area": 100},
        {"segmentation": [left], "category_id": 3, "area": 400},
        {"segmentation": {"counts": counts, "size": [HEIGHT, WIDTH]}, "category_id": 3, "iscrowd": 1, "area": 100},
    ]  # fmt: skip
    coco(
        tmp_path, [{**r, "image_id": i, "bbox": [0, 0, 1, 1]} for i in range(COUNT) for r in rows]
    )
    data = read(tmp_path, "segmentation", "coco: coco.json, images: images, size: [20, 40]")
    assert data.names == {0: "background", 1: "cat", 2: "cup"}
    wanted = torch.zeros(20, 40, dtype=torch.int64)
    wanted[:, :20], wanted[:10, :10], wanted[10:, 30:] = 1, 2, 255
    x, mask = data.evaluation[0]
    assert tuple(x.shape) == (3, 20, 40)
    # the edge of a polygon may count either way
    assert (mask != wanted).double().mean() < 0.05
    inside = torch.ones(20, 40, dtype=torch.bool)
    inside[[0, 9, 10, 19]] = inside[:, [0, 9, 10, 19, 20]] = False
    assert torch.equal(mask[inside], wanted[inside])


def test_points_of_coco_are_cut_out_with_their_box(tmp_path: Path, images: Path) -> None:
    rows = [
        {"bbox": [10, 5, 20, 10], "keypoints": [10, 5, 2, 30, 15, 1, 0, 0, 0], "category_id": 3},
        {"bbox": [0, 0, 5, 5], "keypoints": [0, 0, 0, 0, 0, 0, 0, 0, 0], "category_id": 3},
        {"bbox": [0, 0, 5, 5], "keypoints": [1, 1, 2, 1, 1, 2, 1, 1, 2], "category_id": 3, "iscrowd": 1},
    ]  # fmt: skip
    coco(tmp_path, [{**r, "image_id": i} for i in range(COUNT) for r in rows])
    data = read(tmp_path, "keypoints", "coco: coco.json, images: images, size: [30, 40]")
    assert len(data.calibration) + len(data.evaluation) == COUNT
    for x, points in by_number(data).values():
        assert tuple(x.shape) == (3, 30, 40)
        assert torch.equal(points[:2], torch.tensor([[0.0, 0.0, 2.0], [40.0, 30.0, 1.0]]))
        assert points[2, 2] == 0


def lines(folder: Path, text: str) -> None:
    (folder / "labels").mkdir(exist_ok=True)
    for i in range(COUNT):
        (folder / "labels" / f"{i}.txt").write_text(text)


def test_yolos_polygons_are_masks_and_boxes(tmp_path: Path, images: Path) -> None:
    lines(tmp_path, "1 0.5 0 1 0 1 1 0.5 1\n")
    data = read(tmp_path, "segmentation", "yolo: labels, images: images, size: [10, 20]")
    _, mask = data.evaluation[0]
    assert set(mask[:, :9].unique().tolist()) == {0}
    assert set(mask[:, 11:].unique().tolist()) == {2}
    boxes = "yolo: labels, images: images, size: 10"
    decode = "postprocess: {factory: 'a:b'}"
    target = read(tmp_path, "detection", boxes, decode).evaluation[0][1]
    assert torch.equal(target["boxes"], torch.tensor([[5.0, 0.0, 10.0, 10.0]]))
    assert target["labels"].tolist() == [1]
    lines(tmp_path, "0 0.5 0.5 0.5 1 0.2\n")
    with pytest.raises(ConfigError, match=r"0\.txt:1: expected class x1 y1"):
        read(tmp_path, "segmentation", boxes)


@pytest.mark.parametrize("triples", [False, True])
def test_yolos_poses_are_points_and_boxes(triples: bool, tmp_path: Path, images: Path) -> None:
    points = ["0.25 0.25", "0.75 0.5", "0 0"]
    text = " ".join(p + (f" {0 if p == '0 0' else 2}" if triples else "") for p in points)
    lines(tmp_path, f"0 0.5 0.5 0.5 0.5 {text}")
    data = read(tmp_path, "keypoints", "yolo: labels, images: images, size: [20, 40]")
    _, found = data.evaluation[0]
    torch.testing.assert_close(found[:2, :2], torch.tensor([[0.0, 0.0], [40.0, 10.0]]))
    assert (found[:, 2] > 0).tolist() == [True, True, False]
    lines(tmp_path, "0 0.5 0.5 0.5 0.5")
    with pytest.raises(ConfigError, match=r"0\.txt:1: expected class cx cy w h and points"):
        read(tmp_path, "keypoints", "yolo: labels, images: images, size: 20")


def test_pascal_voc(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "xml"
    folder.mkdir()
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>10</ymax></bndbox>"
    for i in range(COUNT):
        (folder / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.png</filename><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
            f"<object><name>dog</name>{box}</object><object><name>cat</name><difficult>1</difficult>{box}</object></annotation>"
        )
    given, decode = "voc: xml, images: images, size: 10", "postprocess: {factory: 'a:b'}"
    data = read(tmp_path, "detection", given, decode)
    assert data.names == {0: "cat", 1: "dog"}
    target = data.evaluation[0][1]
    assert torch.equal(target["boxes"], torch.tensor([[0.0, 0.0, 5.0, 5.0]] * 2))
    assert (target["labels"].tolist(), target["crowd"].tolist()) == ([1, 0], [False, True])
    ordered = read(tmp_path, "detection", f"{given}, names: [dog, cat, cow]", decode)
    assert ordered.evaluation[0][1]["labels"].tolist() == [0, 1]
    with pytest.raises(ConfigError, match=r"data\.voc: class 'cat': not among data\.names: dog"):
        read(tmp_path, "detection", f"{given}, names: [dog]", decode)
    (folder / "3.xml").write_text("<annotation><object>")
    with pytest.raises(ConfigError, match=r"3\.xml: not Pascal VOC's form"):
        read(tmp_path, "detection", given, decode)


def test_faces_in_pairs(tmp_path: Path) -> None:
    for name, count in (("Ada", 3), ("Bo", 2)):
        for i in range(1, count + 1):
            file = tmp_path / "images" / name / f"{name}_{i:04d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (WIDTH, HEIGHT)).save(file)
    (tmp_path / "pairs.txt").write_text("1 2\nAda\t1\t3\nAda\t1\tBo\t2\nAda\t2\tBo\t1\n")
    given = "pairs: pairs.txt, images: images, size: 16, mean: [0, 0, 0], std: [1, 1, 1]"
    data = read(tmp_path, "embedding", given)
    found = sorted(data.evaluation[i][1] for i in range(len(data.evaluation)))
    assert len(found) + len(data.calibration) == 5
    assert set(found) <= {0, 1}
    assert data.names == {0: "Ada", 1: "Bo"}
    (tmp_path / "pairs.txt").write_text("Ada 1 9\n")
    with pytest.raises(ConfigError, match=r"pairs\.txt:1: no image Ada/Ada_0009"):
        read(tmp_path, "embedding", given)


def test_tables_of_texts_and_of_numbers(tmp_path: Path, images: Path) -> None:
    form = "csv: table.csv, images: images, size: [8, 16], mean: [0, 0, 0], std: [1, 1, 1]"
    table = tmp_path / "table.csv"
    table.write_text("file,text\n" + "".join(f"{i}.png,word {i}\n" for i in range(COUNT)))
    data = read(tmp_path, "ocr", form)
    assert {n: t for n, (_, t) in by_number(data).items()} == {
        n: f"word {n}" for n in by_number(data)
    }
    table.write_text("file,label\n" + "".join(f"{i}.png,{i / 2}\n" for i in range(COUNT)))
    data = read(tmp_path, "regression", form)
    assert all(t == n / 2 for n, (_, t) in by_number(data).items())
    table.write_text("file,label\n0.png,far\n1.png,1\n2.png,1\n3.png,1\n")
    with pytest.raises(ConfigError, match=r"table\.csv:2: label is no number: 'far'"):
        read(tmp_path, "regression", form)
