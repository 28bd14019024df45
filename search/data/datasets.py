"""The user's model and data: built-in sources, or factories in the user's own code."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from search.config.schema import Config, ConfigError
from search.data.boxes import boxed_images
from search.data.class_names import class_names
from search.data.digits import digits
from search.data.images import (
    Data,
    Inputs,
    Preprocessing,
    Samples,
    arrays,
    image_folder,
    image_table,
)
from search.data.masks import coco_masks, mask_folder, yolo_masks
from search.data.pairs import paired_faces
from search.data.points import coco_points, yolo_points
from search.data.sources import preprocessing_of
from search.data.user_code import blame, call_factory
from search.data.video import frame_table, sequence_arrays
from search.data.voc import voc_images

log = logging.getLogger(__name__)

__all__ = ["Data", "Inputs", "batches", "check_splits", "load_data"]


def load_data(cfg: Config) -> Data:
    """The splits of a config; each in a fixed order, calibration and evaluation disjoint.

    Raises:
        ConfigError: the data are missing, too few, in another form, or the factory fails.
    """
    source, made = cfg.data, None
    if source.factory is not None:
        made = call_factory(cfg, "data", source.factory, source.args)
        missing = [name for name in ("calibration", "evaluation") if not hasattr(made, name)]
        if missing:
            raise ConfigError(
                f"data: factory {source.factory}: result has no {' and no '.join(missing)}: "
                f"{type(made).__name__}"
            )
        data = Data(made.calibration, made.evaluation, getattr(made, "training", None))
    elif cfg.task == "video" and source.csv is not None:
        table, images = cfg.resolve(source.csv), cfg.resolve(str(source.images))
        data = frame_table(table, images, source, _preprocessing(cfg))
    elif cfg.task == "video" and source.npz is not None:
        data = sequence_arrays(cfg.resolve(source.npz), source, lambda: _preprocessing(cfg))
    elif source.imagefolder is not None:
        data = image_folder(cfg.resolve(source.imagefolder), source, _preprocessing(cfg))
    elif source.csv is not None and source.images is not None:
        table, images = cfg.resolve(source.csv), cfg.resolve(source.images)
        data = image_table(table, images, source, _preprocessing(cfg), cfg.task)
    elif source.npz is not None:
        data = arrays(cfg.resolve(source.npz), source, lambda: _preprocessing(cfg))
    elif source.digits is not None:
        data = digits(source.digits)
    elif source.pairs is not None:
        table, images = cfg.resolve(source.pairs), cfg.resolve(str(source.images))
        data = paired_faces(table, images, source, _preprocessing(cfg))
    else:
        data = _annotated(cfg)
    names = class_names(cfg, made)
    data = replace(data, names=names) if names else data
    check_splits(data, cfg.path.parent, "(T, C, H, W)" if cfg.task == "video" else "(C, H, W)")
    if cfg.task == "unlabelled" and isinstance(data.evaluation[0], (tuple, list)):
        return replace(data, evaluation=Inputs(data.evaluation))
    return data


def _annotated(cfg: Config) -> Data:
    """Images beside annotations, of which the task says what is read.

    Raises:
        ConfigError: they do not hold what the task needs, or are malformed.
    """
    source = cfg.data
    images = cfg.resolve(str(source.images))
    annotations = cfg.resolve(str(source.coco or source.yolo or source.voc or source.masks))
    if source.masks is not None:
        if cfg.task not in ("segmentation", "unlabelled", "custom"):
            raise ConfigError(f"data.masks: go with task segmentation, not {cfg.task}")
        return mask_folder(annotations, images, source)
    if cfg.task == "segmentation" and source.voc is None:
        read = coco_masks if source.coco is not None else yolo_masks
        return read(annotations, images, source)
    if cfg.task == "keypoints" and source.voc is None:
        read = coco_points if source.coco is not None else yolo_points
        return read(annotations, images, source)
    if source.voc is not None:
        given = [] if source.names is None else list(class_names(cfg).values())
        return voc_images(annotations, images, source, given)
    return boxed_images(annotations, images, source)


def batches(dataset: Samples, size: int) -> Iterator[Any]:
    """A data set in order, in batches of `size`, the last one smaller.

    Yields:
        The stacked inputs, or (stacked inputs, targets) where the samples are pairs; targets are
        stacked where they are numbers or tensors of one shape, else a list.

    Raises:
        ConfigError: the data set fails on a sample, or its inputs differ in shape.
    """
    for start in range(0, len(dataset), size):
        end = min(start + size, len(dataset))
        items = [_sample(dataset, i, Path.cwd()) for i in range(start, end)]
        paired = isinstance(items[0], (tuple, list))
        inputs = [_input(item, start + i, paired) for i, item in enumerate(items)]
        shapes = sorted({tuple(x.shape) for x in inputs})
        if len(shapes) > 1:
            raise ConfigError(f"data: inputs differ in shape: {shapes[0]} and {shapes[1]}")
        stacked = torch.stack(inputs)
        yield (stacked, _stack_targets([item[1] for item in items])) if paired else stacked


def _preprocessing(cfg: Config) -> Preprocessing:
    """The config's keys; what they leave out is as the network's source knows it, else an error."""
    known = preprocessing_of(cfg)
    given = {
        key: getattr(cfg.data, key) for key in ("size", "mean", "std", "crop", "interpolation")
    }
    known |= {key: value for key, value in given.items() if value is not None}
    missing = [key for key in ("size", "mean", "std") if key not in known]
    if missing:
        raise ConfigError(
            f"{cfg.path.name}: data: missing {', '.join(missing)}: how an image becomes the input "
            "is known for models of timm and torchvision only, of an ONNX file its size; pixels are scaled to [0, 1] before mean and std"
        )
    return Preprocessing(**known)


def check_splits(data: Data, folder: Path, shape: str) -> None:
    """Look at the first sample of each split: a wrong form is best named before any work.

    Raises:
        ConfigError: it is no map-style data set, is empty, or has samples of another form.
    """
    splits = {"calibration": data.calibration, "evaluation": data.evaluation}
    shapes: dict[str, tuple[int, ...]] = {}
    if data.training is not None:
        splits["training"] = data.training
    for name, dataset in splits.items():
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            kind = type(dataset).__name__
            raise ConfigError(f"data.{name}: no map-style data set (len() and []): {kind}")
        try:
            count = len(dataset)
        except Exception as error:
            raise ConfigError(f"data.{name}: len(): {blame(error, folder)}") from error
        if count == 0:
            raise ConfigError(f"data.{name}: empty")
        first = _sample(dataset, 0, folder)
        paired = isinstance(first, (tuple, list))
        if paired and (name == "calibration" or len(first) != 2):
            wanted = "inputs alone" if name == "calibration" else "(input, target) pairs"
            raise ConfigError(f"data.{name}: must yield {wanted}: yields {len(first)} values")
        x = first[0] if paired else first
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            kind = f"tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ConfigError(f"data.{name}: inputs must be float32 tensors {shape}: {kind}")
        if shape == "(T, C, H, W)" and x.ndim != 4:
            raise ConfigError(f"data.{name}: inputs must have the shape {shape}: {tuple(x.shape)}")
        shapes[name] = tuple(x.shape)
    if shapes["calibration"] != shapes["evaluation"]:
        fact = f"inputs have the shape {shapes['evaluation']}, those of calibration"
        raise ConfigError(f"data.evaluation: {fact} {shapes['calibration']}")


def _sample(dataset: Samples, index: int, folder: Path) -> Any:
    try:
        return dataset[index]
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"data: sample {index}: {blame(error, folder)}") from error


def _input(item: Any, index: int, paired: bool) -> Tensor:
    """What the network reads of a sample that must be like the first of its batch."""
    if paired != isinstance(item, (tuple, list)) or (paired and len(item) != 2):
        wanted = "an (input, target) pair" if paired else "an input alone"
        raise ConfigError(
            f"data: sample {index}: is not {wanted}, as the others are: {_kind(item)}"
        )
    x = item[0] if paired else item
    if not isinstance(x, Tensor):
        raise ConfigError(f"data: sample {index}: the input is no tensor: {_kind(x)}")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ConfigError(f"data: sample {index}: {bad} values of the input are NaN or infinite")
    return x


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:60]


def _stack_targets(targets: Sequence[Any]) -> Any:
    if all(isinstance(t, Tensor) for t in targets) and len({t.shape for t in targets}) == 1:
        return torch.stack(list(targets))
    if any(isinstance(t, (Tensor, Mapping, Sequence)) for t in targets):
        return list(targets)
    try:
        return torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        fact = "a target is no number, tensor, list or mapping"
        raise ConfigError(
            f"data: {fact}: {_kind(targets[0])}; without labels, yield inputs alone"
        ) from error
