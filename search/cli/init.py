"""The files that a new user starts from: a commented config, and a factory file to fill in."""

from __future__ import annotations

from pathlib import Path

from search.cli.options import KINDS
from search.config.schema import ConfigError

FILL_IN = "FILL IN"

_SHAPE = {
    "classification": "(3, 224, 224)",
    "detection": "(3, 416, 416)",
    "video": "(8, 3, 112, 112)",
    "segmentation": "(3, 256, 256)",
    "keypoints": "(3, 192, 192)",
    "regression": "(3, 224, 224)",
    "ocr": "(3, 32, 160)",
    "embedding": "(3, 112, 112)",
    "custom": "(3, 224, 224)",
    "unlabelled": "(3, 224, 224)",
}
_TARGET = {
    "classification": "the class index, an int",
    "detection": '{"boxes": (n, 4) float, x1 y1 x2 y2 in pixels of the input, "labels": (n,) int}',
    "video": "(T,) int64: 0 or 1 for each frame, -1 where nobody labeled it",
    "segmentation": "mask (H, W) int64 of class indices, 255 where a pixel does not count",
    "keypoints": "(K, 3) float: x, y as the network returns them, and 0 where a point is not labelled",
    "regression": "a float tensor of the shape of one output",
    "ocr": "the text, a str",
    "embedding": "the identity, an int",
    "custom": "whatever metric below reads",
    "unlabelled": "not read; return the input alone",
}
_RETURNS = {
    "classification": "logits, (N, classes)",
    "detection": "raw outputs, nested as you like; Decode below turns them into boxes",
    "video": "scores, (N, T), for inputs (N, T, C, H, W)",
    "segmentation": "scores, (N, classes, h, w), or (N, 1, h, w) of one foreground",
    "keypoints": "points, (N, K, 2) or (N, 2 K), or maps (N, K, h, w)",
    "regression": "numbers, vectors or maps",
    "ocr": "scores, (N, T, classes), class 0 the blank",
    "embedding": "vectors, (N, D)",
    "custom": "whatever metric below reads",
    "unlabelled": "whatever it returns; the distance to that is what counts",
}

_CONFIG = """\
# What quantfix needs to know. Fill in {name}_code.py beside this file, then, in this order:
#   quantfix check   {name}.yaml   does it load and trace, what does it cost
#   quantfix analyze {name}.yaml   which layers int8 hurts, and why
#   quantfix run     {name}.yaml   the whole job; the same command again goes on where it stopped
task: {kind}

# Your network: a function that returns an nn.Module in float32. args are its keyword arguments.
model:
  factory: "{name}_code:build"
  # args: {{weights: best.pt}}
{timm}
# Your images: a function that returns an object with .calibration and .evaluation.
data:
  factory: "{name}_code:data"
{sources}{postprocess}
# How the runtime that you ship to represents int8: onnxruntime, per_tensor, tensorrt,
# tflite or qnn.
target: onnxruntime

calibration:
  method: minmax       # how ranges are found: minmax, percentile or mse

search:
  trials: 60           # plans that are scored
  max_macs: 1.15       # at most 15 % more compute; 1.0 allows none
  # max_drop: 1.0      # for quantfix fix: points of the metric that may be lost
  # workers: 2         # processes
"""

_TIMM = """\
  # Or, instead of factory, a timm model:
  # timm: mobilenetv2_100
  # weights: mobilenetv2_100.safetensors   # or pretrained
"""
_SOURCES = {
    "classification": """\
  # Or, instead of factory, a folder with a sub-folder of images for each class:
  # imagefolder: images
  # calibration: 200     # images that calibrate; the others evaluate
  # size: 224            # these three are known for timm models
  # mean: [0.485, 0.456, 0.406]
  # std: [0.229, 0.224, 0.225]
""",
    "detection": """\
  # Or, instead of factory, images with COCO annotations (or yolo: a folder of text labels):
  # coco: annotations.json
  # images: images
  # size: 416
""",
    "video": """\
  # Or, instead of factory, a table with the columns file, label; one folder of frames a sequence:
  # csv: frames.csv
  # images: frames
  # frames: 8
  # size: 112
  # mean: [0.45, 0.45, 0.45]
  # std: [0.225, 0.225, 0.225]
""",
    "segmentation": """\
  # Or, instead of factory, a folder of mask images (or coco: annotations.json, or yolo: a folder of polygons):
  # masks: masks
  # images: images
  # size: [256, 256]
""",
    "keypoints": """\
  # Or, instead of factory, COCO's keypoints (or yolo: a folder of poses), each object cut out by its box:
  # coco: annotations.json
  # images: images
  # size: [256, 192]
""",
    "regression": """\
  # Or, instead of factory, a table with the columns file, label, a number:
  # csv: table.csv
  # images: images
  # size: 224
  # mean: [0.485, 0.456, 0.406]
  # std: [0.229, 0.224, 0.225]
""",
    "ocr": """\
  # Or, instead of factory, a table with the columns file, text:
  # csv: lines.csv
  # images: images
  # size: [32, 160]
  # mean: [0.5, 0.5, 0.5]
  # std: [0.5, 0.5, 0.5]
""",
    "embedding": """\
  # Or, instead of factory, a folder with a sub-folder for each identity, or LFW's list of pairs:
  # pairs: pairs.txt
  # images: images
  # size: 112
  # mean: [0.5, 0.5, 0.5]
  # std: [0.5, 0.5, 0.5]
""",
    "custom": "",
    "unlabelled": """\
  # Or, instead of factory, a folder of images:
  # imagefolder: images
  # size: 224
  # mean: [0.485, 0.456, 0.406]
  # std: [0.229, 0.224, 0.225]
""",
}
_OPTIONS = {
    "keypoints": """
# What is measured: pck, nme or oks.
task_args: {measure: pck}
""",
    "regression": """
# What is measured: mae, rmse, absrel, delta or psnr.
task_args: {measure: mae}
""",
    "ocr": """
# The character of each class behind the blank, class 0; or a file with one in each line. measure: words or characters.
task_args: {alphabet: "0123456789abcdefghijklmnopqrstuvwxyz", measure: words}
""",
    "embedding": """
# What is measured: auc, tar or retrieval.
task_args: {measure: auc}
""",
}
_METRIC = """
# How good the outputs are: a function of all outputs and targets.
metric:
  factory: "{name}_code:metric"
  higher_is_better: true
"""
_POSTPROCESS = """
# What turns your network's raw outputs into boxes.
postprocess:
  factory: "{name}_code:Decode"
"""

_CODE = '''\
"""Your network and your data, for quantfix. Every place to fill in is marked {mark}."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def build() -> nn.Module:
    """Your trained network in float32. It returns {returns}."""
    # {mark}: make the network and load its weights, such as
    #     model = Net()
    #     model.load_state_dict(torch.load("best.pt", map_location="cpu", weights_only=True))
    #     return model.eval()
    raise NotImplementedError("{mark}: build() must return your network")


class Calibration:
    """Inputs alone; a few hundred are enough. They must not be among those that evaluate."""

    def __len__(self) -> int:
        # {mark}: how many inputs
        raise NotImplementedError("{mark}: Calibration.__len__")

    def __getitem__(self, index: int) -> Tensor:
        # {mark}: one input as the network reads it, normalized, float32 such as {shape}
        raise NotImplementedError("{mark}: Calibration.__getitem__")


class Evaluation:
    """(input, target) pairs, or inputs alone where there are no labels."""

    def __len__(self) -> int:
        # {mark}: how many samples
        raise NotImplementedError("{mark}: Evaluation.__len__")

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        # {mark}: the input, and its target: {target}
        raise NotImplementedError("{mark}: Evaluation.__getitem__")


@dataclass(frozen=True)
class Data:
    calibration: Calibration
    evaluation: Evaluation


def data() -> Data:
    return Data(Calibration(), Evaluation())
'''

_DECODE = '''

class Decode:
    """Raw outputs of a batch to the boxes of each image."""

    def __call__(self, outputs: Any) -> list[dict[str, Tensor]]:
        # {mark}: for each image {{"boxes": (n, 4) x1 y1 x2 y2 in pixels of the input,
        #     "scores": (n,), "labels": (n,)}}, after non-maximum suppression
        raise NotImplementedError("{mark}: Decode.__call__")
'''


_MEASURE = '''

def metric(outputs: Any, targets: Any) -> float:
    """How good the outputs of all samples are; outputs are batched as forward returns them."""
    # {mark}: one number, such as the mean error
    raise NotImplementedError("{mark}: metric()")
'''


def write_start(kind: str, folder: Path, name: str) -> list[Path]:
    """Write ``NAME.yaml`` and ``NAME_code.py``; no file is overwritten.

    Args:
        kind: The task.
        folder: Where to; made where it is missing.
        name: Of the files; must be a Python name, since one of them is imported.

    Raises:
        ConfigError: there is no such kind or the name will not do, or a file is there already.
    """
    if kind not in KINDS:
        raise ConfigError(f"init: unknown kind: {kind}; known: {', '.join(KINDS)}")
    if not (name.isidentifier() and name.isascii()):
        raise ConfigError(f"init: --name: letters, digits and _ only, no digit first: {name!r}")
    facts = {
        "kind": kind,
        "name": name,
        "mark": FILL_IN,
        "shape": _SHAPE[kind],
        "target": _TARGET[kind],
        "returns": _RETURNS[kind],
        "timm": _TIMM if kind == "classification" else "",
        "sources": _SOURCES[kind],
        "postprocess": _POSTPROCESS.format(name=name)
        if kind == "detection"
        else _METRIC.format(name=name)
        if kind == "custom"
        else _OPTIONS.get(kind, ""),
    }
    code = _CODE + {"detection": _DECODE, "custom": _MEASURE}.get(kind, "")
    texts = {f"{name}.yaml": _CONFIG.format(**facts), f"{name}_code.py": code.format(**facts)}
    files = {folder / file: text for file, text in texts.items()}
    there = next((path for path in files if path.exists()), None)
    if there is not None:
        raise ConfigError(f"init: {there}: is there already; choose another --name or --out")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return list(files)
