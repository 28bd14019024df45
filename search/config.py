"""The YAML file that describes one reproducible run.

Whatever is wrong with a file is said in one `ConfigError`: a line per fault, each with the file,
the line number, the key and, for a misspelt key, the right one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from rewriter import QuantizeError
from rewriter import target as named_target

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# where a key stands, ("search", "trials"), and an element of a list, ("data", "mean", 0)
Location: TypeAlias = tuple[str | int, ...]

Channels = Annotated[tuple[float, ...], Field(min_length=1)]
Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]

SOURCES = ("factory", "imagefolder", "csv", "npz", "coco", "yolo", "digits")
PREPROCESSING = ("size", "mean", "std", "crop", "interpolation")


class ConfigError(Exception):
    """What the user gave cannot be used: a config file, a model, data, or an argument."""


class _Section(BaseModel):
    """A mapping of the file; unknown keys and true/false where a number belongs are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        # YAML reads yes, no, on, off as booleans, and a boolean passes for the number 0 or 1
        if isinstance(value, bool):
            fact = f"is {str(value).lower()}; no key takes true or false"
            raise ValueError(fact)  # noqa: TRY004 - pydantic passes a TypeError on
        return value


class FactoryConfig(_Section):
    """A callable of the user's own code and its keyword arguments."""

    factory: Factory
    args: dict[str, Any] = Field(default_factory=dict)


class ModelConfig(_Section):
    """The network: a timm name with weights, or a factory that returns an ``nn.Module``.

    Attributes:
        timm: Name of a timm model.
        weights: ``pretrained`` (fetched by timm; the default), or a state-dict file, relative to
            the config file.
        factory: ``module:callable``.
        args: Keyword arguments of the factory, or of ``timm.create_model``.
    """

    timm: str | None = None
    weights: str | None = None
    factory: Factory | None = None
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.timm is None) == (self.factory is None):
            raise ValueError("needs either timm or factory")
        if self.factory is not None and self.weights is not None:
            raise ValueError("weights go with timm; a factory loads its own")
        return self


class DataConfig(_Section):
    """The images: a factory, or one of the built-in sources.

    Attributes:
        factory: ``module:callable`` that returns an object with ``calibration``, ``evaluation``
            and ``training``.
        args: Keyword arguments of the factory.
        imagefolder: Folder of images, in sub-folders by class, or flat where there are no labels.
        csv: Table ``file,label`` of images in ``images``.
        images: Folder that the files of ``csv``, ``coco`` or ``yolo`` are relative to.
        npz: Archive of ``x``, (N, C, H, W) float or (N, H, W, C) uint8, and ``y``, (N,) integers.
        coco: Annotations in COCO's JSON format.
        yolo: Folder of YOLO text labels, one file for each image.
        digits: Side in pixels of scikit-learn's handwritten digits.
        calibration: How many images calibrate; the others evaluate. None: 300, or a quarter where
            there are few.
        evaluation: At most how many images evaluate. None: all others.
        seed: Of the shuffle that splits the images.
        size: Side of the square that the network reads, in pixels.
        mean: Of a channel, subtracted after scaling to [0, 1].
        std: Of a channel, divided by.
        crop: Fraction of the resized image that the central crop keeps.
        interpolation: Of the resize.
    """

    factory: Factory | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    imagefolder: str | None = None
    csv: str | None = None
    images: str | None = None
    npz: str | None = None
    coco: str | None = None
    yolo: str | None = None
    digits: int | None = Field(default=None, ge=8, le=512)
    calibration: int | None = Field(default=None, ge=1)
    evaluation: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    size: int | None = Field(default=None, ge=1)
    mean: Channels | None = None
    std: Channels | None = None
    crop: float | None = Field(default=None, gt=0, le=1)
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        given = [key for key in SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            found = f"; found {' and '.join(given)}" if given else ""
            raise ValueError(f"needs one of {', '.join(SOURCES)}{found}")
        if self.args and self.factory is None:
            raise ValueError(f"args go with factory, not with {given[0]}")
        if (self.images is not None) != (given[0] in ("csv", "coco", "yolo")):
            raise ValueError("images (a folder) goes with csv, coco or yolo, which need it")
        if given[0] in ("factory", "digits") and self._preprocessed:
            keys = ", ".join(self._preprocessed)
            raise ValueError(f"{keys}: not used with {given[0]}, which prepares its own inputs")
        if self.mean and self.std and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels, std {len(self.std)}")
        if self.std and min(self.std) <= 0:
            raise ValueError(f"std must be above 0: {min(self.std)}")
        return self

    @property
    def _preprocessed(self) -> list[str]:
        return [key for key in PREPROCESSING if getattr(self, key) is not None]


class CalibrationConfig(_Section):
    """How the ranges of the activations are found.

    Attributes:
        samples: At most how many calibration images are used. None: all.
        method: ``minmax``, ``percentile`` or ``mse``.
    """

    samples: int | None = Field(default=None, ge=1)
    method: Literal["minmax", "percentile", "mse"] = "minmax"


class SearchConfig(_Section):
    """What is searched, and for how long.

    Attributes:
        trials: How many plans are tried.
        max_macs: Largest cost, as a ratio to the original: 1.15 allows 15 % more.
        max_drop: Largest loss against the float model, in points of the metric.
        max_float_layers: Most layers that may stay in float.
        objective: What stands against MACs. ``auto``: the metric, or the damage where there are no
            labels.
        seed: Of the sampler and of the fits.
        timeout: Seconds after which no new trial starts.
        workers: Processes that search.
    """

    trials: int = Field(default=100, ge=1)
    max_macs: float = Field(default=1.15, gt=0, le=100)
    max_drop: float | None = Field(default=None, ge=0, le=100)
    max_float_layers: int | None = Field(default=None, ge=0)
    objective: Literal["metric", "damage", "auto"] = "auto"
    seed: int = Field(default=0, ge=0)
    timeout: float | None = Field(default=None, gt=0)
    workers: int = Field(default=1, ge=1)


class Config(_Section):
    """One run. `load_config` reads it.

    Attributes:
        postprocess: Detection only: raw outputs to boxes, scores and labels.
        target: Name of an int8 profile of `rewriter.TARGETS`.
        engine: What scores a candidate. ``auto``: the target's own kernels where they run here.
        device: Where torch runs. ``auto``: a GPU where there is one.
    """

    task: Literal["classification", "detection", "video"]
    model: ModelConfig
    data: DataConfig
    postprocess: FactoryConfig | None = None
    target: str = "onnxruntime"
    engine: Literal["auto", "onnxruntime", "simulate"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    calibration: CalibrationConfig = Field(default_factory=CalibrationConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)

    _path: Path = PrivateAttr(default=Path("config.yaml"))

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str) -> str:
        try:
            named_target(value)
        except QuantizeError as error:
            # "target: unknown: ..."; the key is put before every message anyway
            raise ValueError(str(error).removeprefix("target: ")) from error
        return value

    @model_validator(mode="after")
    def _detection_has_boxes(self) -> Config:
        if self.postprocess is not None and self.task != "detection":
            raise ValueError(f"postprocess goes with task detection, not {self.task}")
        return self

    @property
    def path(self) -> Path:
        """The file that this was read from."""
        return self._path

    def read_from(self, path: Path) -> Config:
        """Edit self: note the file, whose folder is where relative paths and user code start."""
        self._path = path
        return self

    def resolve(self, name: str) -> Path:
        """A path of the file, relative to the file's folder; ``~`` is the home folder."""
        return Path(os.path.normpath(self._path.parent / Path(name).expanduser()))


def load_config(path: str | Path) -> Config:
    """Read a config file.

    Raises:
        ConfigError: the file is missing, no YAML mapping, or has unknown keys or unusable values.
    """
    path = Path(path).expanduser().absolute()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {_reason(error)}") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark.line + 1) if error.problem_mark else 1
        raise ConfigError(f"{path.name}:{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name}: not YAML: {error}") from error
    except ValueError as error:
        # a scalar that looks like a date or a number but is none
        raise ConfigError(f"{path.name}: not YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        kind = "empty" if root is None else f"a {root.tag.rpartition(':')[2]}"
        raise ConfigError(f"{path.name}: must hold keys such as task and model, but is {kind}")

    lines: dict[Location, int] = {(): 1}
    faults = list(_walk(root, (), lines))
    if not faults:
        try:
            config = Config.model_validate(content)
        except ValidationError as error:
            faults = [
                (_line(item["loc"], lines), f"{_dotted(item['loc'])}: {_explain(item)}")
                for item in error.errors()
            ]
        else:
            return config.read_from(path)
    raise ConfigError(
        "\n".join(f"{path.name}:{line}: {fault}" for line, fault in sorted(set(faults)))
    )


def shipped_config(name: str) -> Path:
    """A config that comes with the package: of the checkout, or of the installed wheel."""
    here = Path(__file__).resolve().parent
    candidates = [here.parent / "configs" / name, here / "configs" / name]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise ConfigError(f"{name}: no such shipped config; looked in {candidates[0].parent}")
    return found[0]


def _walk(node: yaml.Node, at: Location, lines: dict[Location, int]) -> Iterator[tuple[int, str]]:
    """Edit `lines`: the line of every key; yields keys that YAML wrongly lets pass."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[*at, i] = item.start_mark.line + 1
            yield from _walk(item, (*at, i), lines)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)
            if (*at, name) in lines:
                first = lines[*at, name]
                yield line, f"{_dotted((*at, name))}: given twice, first in line {first}"
            lines[*at, name] = line
            yield from _walk(value, (*at, name), lines)


def _explain(fault: ErrorDetails) -> str:
    """What one fault that pydantic found means to the writer of the file."""
    kind, loc, given = fault["type"], fault["loc"], fault["input"]
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "extra_forbidden":
        return f"unknown key{_nearest(loc)}"
    if kind == "missing":
        return f"missing{_choices(loc)}"
    if kind == "value_error":
        return message
    if kind in ("model_type", "model_attributes_type"):
        return f"must hold keys{_choices(loc)}; is {given!r}"
    if kind == "string_pattern_mismatch":
        form = "auto, cpu, cuda or cuda:N" if loc[-1] == "device" else '"module:callable"'
        return f"must be {form}; is {given!r}"
    if kind == "literal_error":
        choices = re.findall(r"'(\w+)'", fault.get("ctx", {}).get("expected", ""))
        near = difflib.get_close_matches(str(given), choices, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{message}; is {given!r}{hint}"
    return f"{message}; is {given!r}"


def _line(loc: Location, lines: Mapping[Location, int]) -> int:
    """The line of the key, or of the mapping that lacks it."""
    while loc not in lines:
        loc = loc[:-1]
    return lines[loc]


def _dotted(loc: Location) -> str:
    return ".".join(str(part) for part in loc) or "the file"


def _keys(section: type[BaseModel], at: Location = ()) -> Iterator[tuple[Location, list[str]]]:
    """Every section with the keys it takes."""
    yield at, list(section.model_fields)
    for name, field in section.model_fields.items():
        for option in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from _keys(option, (*at, name))


def _choices(loc: Location) -> str:
    keys = dict(_keys(Config)).get(loc)
    return f" (keys: {', '.join(keys)})" if keys else ""


def _nearest(loc: Location) -> str:
    """The right key: the same word in another section, else the nearest in this one."""
    sections = dict(_keys(Config))
    word, siblings = str(loc[-1]), sections.get(loc[:-1], [])
    elsewhere = [(*at, word) for at, keys in sections.items() if word in keys]
    near = difflib.get_close_matches(word, siblings, 1)
    if elsewhere:
        return f"; did you mean {_dotted(elsewhere[0])}?"
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(siblings)}"


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "not text in UTF-8"
