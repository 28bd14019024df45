"""A config for a user who has an ONNX or TensorFlow Lite file and a folder of images and nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from rewriter.errors import TraceError
from rewriter.onnx_import import file_sizes
from rewriter.tflite_import import tflite_sizes
from search.cli.console import say
from search.config.schema import Config, ConfigError, load_config

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of the damage, where the user names no goal: a KL divergence or a relative squared error that is hardly seen.
MAX_DAMAGE = 0.02
MODEL_FILES = (".onnx", ".tflite")
TRIALS = 40
HEAD = """\
# Written by quantfix fix for {model}; edit it, and quantfix run, front, export and fix take it as any other config.
"""


def config_of_model(
    model: Path,
    images: Path | None,
    folder: Path,
    target: str | None = None,
    shape: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    quiet: bool = False,
) -> Config:
    """Write ``config.yaml`` into the run directory, and read it.

    Args:
        model: An ONNX or TensorFlow Lite file.
        images: A folder of images; labels in its sub-folders are not read.
        folder: The run directory.
        target: Name of an int8 profile; None: that of a config which is there, or onnxruntime.
        shape: ``C,H,W`` of the input where the file leaves it open.
        mean: Of each channel, comma-separated, after scaling pixels to [0, 1]; None: ImageNet's.
        std: The same to divide by.
        quiet: Say nothing of what is assumed.

    Raises:
        ConfigError: the file or the folder cannot be used, or an option cannot be read.
    """
    path = folder / "config.yaml"
    if images is None:
        if path.is_file():
            if any(v is not None for v in (target, shape, mean, std)):
                raise ConfigError(
                    f"fix: --target, --shape, --mean and --std go with --images; {path} is there: edit it"
                )
            return load_config(path)
        raise ConfigError(
            "fix: --images DIR: missing: a folder of images to calibrate and to judge on"
        )
    if not images.is_dir():
        raise ConfigError(f"fix: --images: no such folder: {images}")
    sizes = _sizes(shape) if shape is not None else None
    lite = model.suffix == ".tflite"
    try:
        if lite and sizes:
            raise ConfigError("fix: --shape goes with .onnx; a .tflite file fixes its sizes")
        found = tflite_sizes(model) if lite else file_sizes(model, sizes)
    except TraceError as error:
        raise ConfigError(f"model.{error}") from error
    if len(found) != 1 or len(found[0]) != 3 or found[0][0] not in (1, 3):
        read = ", ".join(map(str, found))
        raise ConfigError(
            f"fix: {model.name} reads {read}, no single image (C, H, W); write a config with a data factory"
        )
    channels, height, width = found[0]
    data: dict[str, Any] = {"imagefolder": str(images.absolute())}
    data["size"] = height if height == width else [height, width]
    for name, given, otherwise in (("mean", mean, IMAGENET_MEAN), ("std", std, IMAGENET_STD)):
        values = list(otherwise) if given is None else _numbers(given, f"--{name}")
        if given is not None and len(values) != channels:
            raise ConfigError(f"fix: --{name}: {len(values)} numbers for {channels} channels")
        data[name] = values if len(values) == channels else [sum(values) / len(values)]
    if (mean is None or std is None) and not quiet:
        say(
            f"pixels are normalized by mean {data['mean']}, std {data['std']}: assumed; --mean and --std say otherwise"
        )
    if height == width:
        data["crop"] = 1.0
    source: dict[str, Any] = {"tflite" if lite else "onnx": str(model.absolute())}
    if sizes:
        source["args"] = {"shape": sizes}
    content = {
        "task": "unlabelled",
        "model": source,
        "data": data,
        "target": target or "onnxruntime",
        "search": {"trials": TRIALS},
    }
    folder.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.is_file() else None
    path.write_text(
        HEAD.format(model=model.name) + yaml.safe_dump(content, sort_keys=False), encoding="utf-8"
    )
    try:
        return load_config(path)
    except ConfigError:
        # what is refused is not there for the next command to read
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)
        raise


def _sizes(text: str) -> list[int]:
    values = _numbers(text, "--shape")
    if any(v < 1 or v != int(v) for v in values):
        raise ConfigError(f"fix: --shape: must be whole numbers above 0: {text}")
    return [int(v) for v in values]


def _numbers(text: str, option: str) -> list[float]:
    try:
        values = [float(v) for v in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(math.isfinite, values)):
        raise ConfigError(f"fix: {option}: must be numbers separated by commas: {text}")
    return values
