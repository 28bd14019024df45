"""The YAML file that describes one reproducible run.

Whatever is wrong with a file is said in one `ConfigError`: a line per fault, each with the file,
the line number, the key and, for a misspelt key, the right one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

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
from search.config.messages import Location, dotted, explain, line_of, reason, walk
from search.engines import check_engines

Channels = Annotated[tuple[float, ...], Field(min_length=1)]
Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]

SOURCES = ("factory", "imagefolder", "csv", "npz", "coco", "yolo", "digits")
VIDEO_SOURCES = ("factory", "csv", "npz")
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
        names: Of the classes, for the report: a list, or a file (YAML with ``names``, or a name in each line).
        frames: Video only: frames of a sequence that the network reads at once.
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
    names: list[str] | str | None = None
    frames: int | None = Field(default=None, ge=1)
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
        max_params: Most parameters, as a ratio to the original.
        max_weight_bytes: Largest size of the stored weights, in bytes.
        max_float_layers: Most layers that may stay in float.
        min_int8_share: Least share of the MACs that the file should compute on int8 kernels; a run whose
            files compute less warns and says which layers run in float.
        max_float_islands: Most connected groups of such layers.
        max_latency_ms: Longest time for one input, in ONNX Runtime on the machine that searches.
        max_drop: Largest loss against the float model, in points of the metric; for ``fix``.
        max_damage: Largest damage, where there are no labels; for ``fix``.
        cost: What quality is weighed against: ``macs``, or ``latency``, measured as for
            `max_latency_ms`. A time never repeats exactly, and so does no front over it.
        objective: What stands against MACs. ``auto``: the metric, or the damage where there are no
            labels.
        seed: Of the sampler and of the fits.
        timeout: Seconds after which no new trial starts.
        candidate_timeout: Seconds after which a plan that is being scored is given up.
        confirmation: Share of the evaluation images that has no part in choosing among plans, and
            confirms those on the front at the end; 0: none. Default: a third where there are 300.
        race: Images after which a plan may first be given up, because it is clear that it is not
            on the front; 0: never. Four times as many are needed.
        store: Folder, or fsspec URL such as ``s3://bucket/run``, in which fitted weights and scores
            are shared with other run directories. Default: the run directory has its own.
        workers: Processes that search.
        worker_cpus: On a Ray cluster, processor cores of each.
        worker_gpus: The same of GPUs; a fraction where several share one.
    """

    trials: int = Field(default=100, ge=1)
    max_macs: float = Field(default=1.15, gt=0, le=100)
    max_params: float | None = Field(default=None, gt=0, le=100)
    max_weight_bytes: int | None = Field(default=None, ge=1)
    max_float_layers: int | None = Field(default=None, ge=0)
    min_int8_share: float = Field(default=0.95, ge=0, le=1)
    max_float_islands: int | None = Field(default=None, ge=0)
    max_latency_ms: float | None = Field(default=None, gt=0)
    max_drop: float | None = Field(default=None, ge=0, le=100)
    max_damage: float | None = Field(default=None, ge=0)
    cost: Literal["macs", "latency"] = "macs"
    objective: Literal["metric", "damage", "auto"] = "auto"
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    timeout: float | None = Field(default=None, gt=0)
    candidate_timeout: float = Field(default=3600.0, gt=0)
    confirmation: float | None = Field(default=None, ge=0, le=0.9)
    race: int = Field(default=64, ge=0)
    store: str | None = Field(default=None, min_length=1)
    # each is a process with a network of its own; more belong on more machines (quantfix worker)
    workers: int = Field(default=1, ge=1, le=64)
    worker_cpus: int = Field(default=1, ge=1)
    worker_gpus: float = Field(default=0.0, ge=0)


class FinetuneConfig(_Section):
    """How chosen plans are trained end to end; see docs/video.md.

    Attributes:
        plans: Which plans a run trains after its search; ``run --finetune`` overrides it.
        loss: ``distillation``: answer as the float network does, which needs no labels;
            ``labels``: the task's own loss on the training data.
        quantization: ``learned``: int8 is simulated and its step sizes are trained too; ``fixed``:
            simulated with the step sizes of the calibration; ``float``: trained without int8.
        steps: Batches at most.
        batch: Inputs in a batch.
        rate: Largest change of a weight in one step, relative to the weights of its channel.
        ema: Decay of the moving average of the weights, which is what is judged and kept.
        validation: Share of the training inputs that judges instead of training.
        check: Steps between two judgements; a killed run loses at most so many.
        patience: Judgements without an improvement after which training stops.
        views: ``mixed``: three of four inputs are mirrored and cut out, where nothing depends on
            left and right; ``plain``: as they are.
        seed: Of the batches.
        inputs: A data set of its own to train on, returned by a factory. Default: the training
            data, and without any the calibration inputs.
    """

    plans: Literal["none", "knee", "best", "all-front"] = "none"
    loss: Literal["distillation", "labels"] = "distillation"
    quantization: Literal["learned", "fixed", "float"] = "learned"
    steps: int = Field(default=400, ge=1)
    batch: int = Field(default=16, ge=1)
    rate: float = Field(default=5e-4, gt=0, le=1)
    ema: float = Field(default=0.98, ge=0, lt=1)
    validation: float = Field(default=0.2, gt=0, le=0.9)
    check: int = Field(default=20, ge=1)
    patience: int = Field(default=8, ge=1)
    views: Literal["plain", "mixed"] = "plain"
    seed: int = Field(default=0, ge=0)
    inputs: FactoryConfig | None = None


class Config(_Section):
    """One run. `load_config` reads it.

    Attributes:
        postprocess: Detection only: raw outputs to boxes, scores and labels.
        target: Name of an int8 profile of `rewriter.TARGETS`.
        engine: What scores a candidate, or several, best first, of which the first that can run here does. ``auto``: the
            target's own kernels where they run here, else a simulation.
        device: Where torch runs. ``auto``: a GPU where there is one.
    """

    task: Literal["classification", "detection", "video"]
    model: ModelConfig
    data: DataConfig
    postprocess: FactoryConfig | None = None
    target: str = "onnxruntime"
    engine: str | list[str] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    calibration: CalibrationConfig = Field(default_factory=CalibrationConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig)

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

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of the engines asked for, best first; none: those of the target."""
        if self.engine == "auto":
            return ()
        return (self.engine,) if isinstance(self.engine, str) else tuple(self.engine)

    @model_validator(mode="after")
    def _engines_run_the_target(self) -> Config:
        check_engines(self.engines, self.target)
        return self

    @model_validator(mode="after")
    def _detection_has_boxes(self) -> Config:
        if self.postprocess is not None and self.task != "detection":
            raise ValueError(f"postprocess goes with task detection, not {self.task}")
        return self

    @model_validator(mode="after")
    def _video_has_sequences(self) -> Config:
        if self.task == "video" and all(getattr(self.data, k) is None for k in VIDEO_SOURCES):
            raise ValueError(f"task video reads data from one of {', '.join(VIDEO_SOURCES)}")
        if self.task != "video" and self.data.frames is not None:
            raise ValueError(f"data.frames goes with task video, not {self.task}")
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
        raise ConfigError(f"{path}: cannot be read: {reason(error)}") from error
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
    faults = list(walk(root, (), lines))
    if not faults:
        try:
            config = Config.model_validate(content)
        except ValidationError as error:
            faults = [
                (line_of(item["loc"], lines), f"{dotted(item['loc'])}: {explain(item, Config)}")
                for item in error.errors()
            ]
        else:
            return config.read_from(path)
    raise ConfigError(
        "\n".join(f"{path.name}:{line}: {fault}" for line, fault in sorted(set(faults)))
    )


def shipped_config(name: str) -> Path:
    """A config that comes with the package: of the checkout, or of the installed wheel."""
    here = Path(__file__).resolve().parents[1]
    candidates = [here.parent / "configs" / name, here / "configs" / name]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise ConfigError(f"{name}: no such shipped config; looked in {candidates[0].parent}")
    return found[0]
