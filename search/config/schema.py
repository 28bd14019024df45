"""The YAML file that describes one reproducible run.

Whatever is wrong with a file is said in one `ConfigError`: a line per fault, each with the file,
the line number, the key and, for a misspelt key, the right one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from rewriter import QuantizeError
from rewriter import target as named_target
from rewriter.damage import MeaningError, declared
from search.config.inputs import DataConfig, FactoryConfig, ModelConfig, Section
from search.config.messages import Location, dotted, explain, line_of, reason, walk
from search.engines import check_engines

# tasks whose outputs may need code of the user's own to become a prediction
POSTPROCESSED = ("detection", "segmentation", "keypoints", "regression", "ocr")
float_ = float  # the name of a key below
VIDEO_SOURCES = ("factory", "csv", "npz")


class ConfigError(Exception):
    """What the user gave cannot be used: a config file, a model, data, or an argument."""


class CalibrationConfig(Section):
    """How the ranges of the activations are found.

    Attributes:
        samples: At most how many calibration images are used. None: all.
        method: ``minmax``, ``percentile`` or ``mse``.
    """

    samples: int | None = Field(default=None, ge=1)
    method: Literal["minmax", "percentile", "mse"] = "minmax"


class ExpectConfig(Section):
    """What is known of the network beforehand; a run warns where it measures something else.

    Attributes:
        float: The metric of the float network, in percent or as a fraction of 1.
    """

    float: float_ | None = Field(default=None, gt=0, le=100)


MOST_MACS, BELOW = 1.15, 0.9  # by default; of a largest cost under 1, how low the front goes


class SearchConfig(Section):
    """What is searched, and for how long.

    Attributes:
        trials: How many plans are tried.
        macs: Costs to cover, as ratios to the original: below 1, channels may be taken away.
        recipe: File of plans that proved good on this architecture (``quantfix recipe``), tried first.
        trackers: Where scores go as they come: ``tensorboard``, ``mlflow``, ``wandb``.
        resolution: ``fixed``: images are not made smaller to save compute.
        max_macs: Largest cost alone: 1.15 allows 15 % more. Default: that of `macs`, or 1.15.
        max_params: Most parameters, as a ratio to the original.
        max_weight_bytes: Largest size of the stored weights, in bytes.
        max_float_layers: Most layers that may stay in float.
        min_int8_share: Least share of the MACs that the file should compute on int8 kernels; a run whose
            files compute less warns and says which layers run in float.
        max_float_islands: Most connected groups of such layers.
        max_latency_ms: Longest time for one input, in ONNX Runtime on the machine that searches.
        max_latency_ratio: Longest time of a plan's file on one thread, relative to that of plain int8, by the
            table of kernels (see `LatencyConfig`); where ONNX Runtime runs the target. 0: no bound.
        max_drop: Largest loss against the float model, in points of the metric; for ``fix``.
        max_damage: Largest damage, where there are no labels; for ``fix``.
        cost: What quality is weighed against: ``macs``, ``latency`` (by the table of kernels, so that equal
            files cost the same; where there is none, measured as for `max_latency_ms`), or ``bytes`` of the file.
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

    recipe: str | None = None
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    trials: int = Field(default=100, ge=1)
    macs: tuple[float, float] | None = None
    resolution: Literal["free", "fixed"] = "free"
    max_macs: float | None = Field(default=None, gt=0, le=100)
    max_params: float | None = Field(default=None, gt=0, le=100)
    max_weight_bytes: int | None = Field(default=None, ge=1)
    max_float_layers: int | None = Field(default=None, ge=0)
    min_int8_share: float = Field(default=0.95, ge=0, le=1)
    max_float_islands: int | None = Field(default=None, ge=0)
    max_latency_ms: float | None = Field(default=None, gt=0)
    max_latency_ratio: float = Field(default=1.1, ge=0)
    max_drop: float | None = Field(default=None, ge=0, le=100)
    max_damage: float | None = Field(default=None, ge=0)
    cost: Literal["macs", "latency", "bytes"] = "macs"
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

    @field_validator("macs")
    @classmethod
    def _rising(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1] <= 100:
            raise ValueError(f"two ratios from small to large, such as [0.7, 1.15]: {list(value)}")
        return value

    @property
    def most_macs(self) -> float:
        """Largest cost of a plan, as a ratio to the original."""
        return self.max_macs or (MOST_MACS if self.macs is None else self.macs[1])

    @property
    def least_macs(self) -> float:
        """Smallest cost that the front has to cover: 1 where nothing is to be saved."""
        if self.macs:
            return min(self.macs[0], self.most_macs)
        return 1.0 if self.most_macs >= 1 else self.most_macs * BELOW


class LatencyConfig(Section):
    """Where the times of kernels come from; see docs/latency.md.

    Attributes:
        table: CSV file of kernels and milliseconds that was measured on a device. Default: this machine's own,
            in the user's cache folder; kernels that it lacks are measured.
    """

    table: str | None = Field(default=None, min_length=1)


class FinetuneConfig(Section):
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


class MetricConfig(FactoryConfig):
    """How good the outputs of a custom task are.

    Attributes:
        factory: ``module:callable``, called with the outputs on all samples and their targets; returns a number.
        higher_is_better: Direction of that number.
    """

    higher_is_better: bool = True


class Config(Section):
    """One run. `load_config` reads it.

    Attributes:
        task: What the network is for: one of `TASKS`, each of which has a file in `search.tasks`.
        task_args: What the task may be told, such as ``measure`` of keypoints; its file says what.
        postprocess: Raw outputs to boxes, scores and labels (detection), or to the prediction of another task.
        metric: Custom only: outputs and targets to a number.
        outputs: What each output of the network means, where the task does not say it or says
            something else; see docs/damage.md.
        target: Name of an int8 profile of `rewriter.TARGETS`.
        engine: What scores a candidate, or several, best first, of which the first that can run here does. ``auto``: the
            target's own kernels where they run here, else a simulation.
        expect: What the float network is known to reach.
        device: Where torch runs. ``auto``: a GPU where there is one.
    """

    task: Literal[
        "classification",
        "detection",
        "video",
        "custom",
        "segmentation",
        "keypoints",
        "regression",
        "ocr",
        "embedding",
        "unlabelled",
    ]
    task_args: dict[str, Any] = Field(default_factory=dict)
    model: ModelConfig
    data: DataConfig
    postprocess: FactoryConfig | None = None
    metric: MetricConfig | None = None
    outputs: Any = None
    target: str = "onnxruntime"
    engine: str | list[str] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    calibration: CalibrationConfig = Field(default_factory=CalibrationConfig)
    expect: ExpectConfig = Field(default_factory=ExpectConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    latency: LatencyConfig = Field(default_factory=LatencyConfig)
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

    @field_validator("outputs")
    @classmethod
    def _readable_outputs(cls, value: Any) -> Any:
        if value is not None:
            try:
                declared(value)
            except MeaningError as error:
                raise ValueError(str(error).removeprefix("outputs: ")) from error
        return value

    @model_validator(mode="after")
    def _detection_has_boxes(self) -> Config:
        if self.postprocess is not None and self.task not in POSTPROCESSED:
            raise ValueError(
                f"postprocess goes with task {', '.join(POSTPROCESSED)}, not {self.task}"
            )
        return self

    @model_validator(mode="after")
    def _custom_has_a_metric(self) -> Config:
        if self.metric is not None and self.task != "custom":
            raise ValueError(f"metric goes with task custom, not {self.task}, which has its own")
        if self.metric is None and self.task == "custom":
            raise ValueError("task custom needs metric: {factory: module:callable}")
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


TASKS: tuple[str, ...] = get_args(Config.model_fields["task"].annotation)
"""Names of the tasks."""


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
