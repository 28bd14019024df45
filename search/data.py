"""The user's model and data: built-in sources, or factories in the user's own code."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import timm
import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from search.boxes import boxed_images
from search.class_names import class_names
from search.config import Config, ConfigError
from search.digits import digits
from search.images import Data, Inputs, Preprocessing, Samples, arrays, image_folder, image_table
from search.user_code import blame
from search.video_data import frame_table, sequence_arrays

log = logging.getLogger(__name__)

__all__ = ["Data", "Inputs", "batches", "call_factory", "load_data", "load_model"]

# where training scripts put the weights inside a checkpoint
STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
OWN_PACKAGES = frozenset({"rewriter", "search"})


def load_model(cfg: Config) -> nn.Module:
    """The float32 network of a config, on the CPU and in eval mode.

    Raises:
        ConfigError: there is no such model, its weights cannot be had or do not fit, or the
            factory fails or returns something else.
    """
    if cfg.model.factory is not None:
        model = call_factory(cfg, "model", cfg.model.factory, cfg.model.args)
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise ConfigError(f"model: factory {cfg.model.factory}: returned no nn.Module: {kind}")
    else:
        model = _timm_model(cfg)
    return _on_cpu_in_float32(model)


def _on_cpu_in_float32(model: nn.Module) -> nn.Module:
    """Edit model: int8 is compared with float32, whatever the network is kept in."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    empty = next((name for name, t in tensors.items() if t.is_meta), None)
    if empty is not None:
        raise ConfigError(
            f"model: {empty}: on the device meta, without values; load weights first"
        )
    odd = {str(t.dtype) for t in tensors.values() if t.is_floating_point()} - {"torch.float32"}
    if odd:
        log.warning("model: has %s values: converted to float32", ", ".join(sorted(odd)))
    return model.cpu().float().eval()


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
        data = image_table(table, images, source, _preprocessing(cfg))
    elif source.npz is not None:
        data = arrays(cfg.resolve(source.npz), source, lambda: _preprocessing(cfg))
    elif source.digits is not None:
        data = digits(source.digits)
    else:
        annotations = str(source.coco or source.yolo)
        data = boxed_images(cfg.resolve(annotations), cfg.resolve(str(source.images)), source)
    names = class_names(cfg, made)
    data = replace(data, names=names) if names else data
    _check_splits(data, cfg.path.parent, "(T, C, H, W)" if cfg.task == "video" else "(C, H, W)")
    return data


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


def call_factory(cfg: Config, key: str, name: str, args: Mapping[str, Any]) -> Any:
    """What a ``module:callable`` returns; the config file's folder is on the import path.

    Args:
        cfg: Whose folder it is.
        key: Section of the config, for messages.
        name: ``module:callable``.
        args: Keyword arguments.

    Raises:
        ConfigError: there is no such callable, the arguments do not fit, or it raises.
    """
    module_name, _, attribute = name.partition(":")
    subject, folder = f"{key}: factory {name}", cfg.path.parent
    try:
        module = _import_user_module(module_name, folder)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            fact = f"no module {error.name}, neither in {folder} nor installed"
            raise ConfigError(f"{subject}: {fact}") from error
        raise ConfigError(f"{subject}: {blame(error, folder)}") from error
    except ConfigError as error:
        raise ConfigError(f"{subject}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{subject}: {blame(error, folder)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        near = difflib.get_close_matches(attribute, names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{subject}: {module_name} has no callable {attribute}{hint}")
    _check_arguments(subject, function, args)
    try:
        return function(**args)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{subject}: {blame(error, folder)}") from error


def _import_user_module(name: str, folder: Path) -> ModuleType:
    top = name.partition(".")[0]
    own = [p for p in (folder / f"{top}.py", folder / top / "__init__.py") if p.is_file()]
    if own and top in OWN_PACKAGES and Path(__file__).parent.parent not in own[0].parents:
        raise ConfigError(f"{own[0].name}: the name {top} is quantfix's own; rename the file")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    loaded = sys.modules.get(top)
    if own and loaded is not None and top not in OWN_PACKAGES:
        # a module of this name, but of another config's folder, was imported before
        if Path(loaded.__file__ or "").absolute() != own[0].absolute():
            for other in [m for m in sys.modules if m == top or m.startswith(top + ".")]:
                del sys.modules[other]
        sys.path.remove(str(folder))
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _check_arguments(subject: str, function: Callable[..., Any], args: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # written in C: it says itself what does not fit
    try:
        signature.bind(**args)
    except TypeError as error:
        raise ConfigError(f"{subject}: args do not fit {signature}: {error}") from error


def _timm_model(cfg: Config) -> nn.Module:
    name, weights = str(cfg.model.timm), cfg.model.weights or "pretrained"
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ConfigError(f"model.timm: unknown to timm {timm.__version__}: {name}{hint}")
    if weights != "pretrained":
        model = _create(cfg, name, pretrained=False)
        _load_weights(model, cfg.resolve(weights))
        return model
    return _create(cfg, name, pretrained=True)


def _create(cfg: Config, name: str, *, pretrained: bool) -> nn.Module:
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # its warning for each retry would bury the one message below
    try:
        return timm.create_model(name, pretrained=pretrained, **cfg.model.args)
    except TypeError as error:
        raise ConfigError(f"model: args do not fit {name}: {error}") from error
    except Exception as error:
        if not pretrained:
            raise ConfigError(f"model: timm.create_model({name!r}): {blame(error)}") from error
        # whatever the hub's client raises: no network, no such repository, no pretrained weights
        reason = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        )
        raise ConfigError(
            f"model: {name}: the pretrained weights could not be fetched ({reason}); "
            "give a file instead: weights: FILE.safetensors"
        ) from error
    finally:
        hub.setLevel(level)


def _load_weights(model: nn.Module, file: Path) -> None:
    """Edit model: load a state dict. Only tensors are read from a file, never code."""
    if not file.is_file():
        raise ConfigError(f"model.weights: no such file: {file}")
    try:
        if file.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(file)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old pickles, which are refused below
                state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found.group(1)})" if found else ""
        fact = f"holds code or objects{what}, not only tensors: refused, as loading would run it"
        raise ConfigError(f"model.weights: {file}: {fact}; save model.state_dict()") from error
    except Exception as error:  # a damaged file makes the readers raise whatever they meet first
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        fact = f"not readable as a file of tensors: {first}; save model.state_dict()"
        raise ConfigError(f"model.weights: {file}: {fact}") from error
    for key in STATE_KEYS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"model.weights: {file}: holds no state dict")
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        fact = " ".join(str(error).split())
        raise ConfigError(f"model.weights: {file.name} does not fit the model: {fact}") from error
    missing = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    for what, keys in (("lacks", missing), ("has unknown", result.unexpected_keys)):
        if keys:
            named = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ConfigError(f"model.weights: {file.name} does not fit the model: {what} {named}")


def _preprocessing(cfg: Config) -> Preprocessing:
    """The config's keys; what they leave out is timm's own for a timm model, else an error."""
    known: dict[str, Any] = {}
    if cfg.model.timm is not None and timm.is_model(cfg.model.timm):
        pretrained = timm.get_pretrained_cfg(cfg.model.timm)
        resolved = resolve_data_config(
            dict(cfg.model.args), pretrained_cfg=pretrained.to_dict() if pretrained else {}
        )
        known = {
            "size": resolved["input_size"][-1],
            "mean": resolved["mean"],
            "std": resolved["std"],
            "crop": resolved["crop_pct"],
            "interpolation": resolved["interpolation"],
            "crop_mode": resolved["crop_mode"],
        }
    given = {
        key: getattr(cfg.data, key) for key in ("size", "mean", "std", "crop", "interpolation")
    }
    known |= {key: value for key, value in given.items() if value is not None}
    missing = [key for key in ("size", "mean", "std") if key not in known]
    if missing:
        raise ConfigError(
            f"{cfg.path.name}: data: missing {', '.join(missing)}: how an image becomes the input "
            "is known for timm models only; pixels are scaled to [0, 1] before mean and std"
        )
    return Preprocessing(**known)


def _check_splits(data: Data, folder: Path, shape: str) -> None:
    """Look at the first sample of each split: a wrong form is best named before any work."""
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
