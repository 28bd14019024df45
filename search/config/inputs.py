"""The sections of a config that say what goes in: the network, the images, and code of the user's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

Channels = Annotated[tuple[float, ...], Field(min_length=1)]
Side = Annotated[int, Field(ge=1)]
Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]

SOURCES = (
    "factory",
    "imagefolder",
    "csv",
    "npz",
    "coco",
    "yolo",
    "voc",
    "masks",
    "pairs",
    "digits",
)
BESIDE_IMAGES = ("csv", "coco", "yolo", "voc", "masks", "pairs")
PREPROCESSING = ("size", "mean", "std", "crop", "interpolation")


class Section(BaseModel):
    """A mapping of the file; unknown keys and true/false where a number belongs are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes, no, on, off as booleans, and a boolean passes for the number 0 or 1
        wanted = cls.model_fields[str(info.field_name)].annotation is bool
        if isinstance(value, bool) and not wanted:
            fact = f"is {str(value).lower()}; this key takes neither true nor false"
            raise ValueError(fact)
        return value


class FactoryConfig(Section):
    """A callable of the user's own code and its keyword arguments."""

    factory: Factory
    args: dict[str, Any] = Field(default_factory=dict)


class ModelConfig(Section):
    """Where the network comes from: one of the keys below, each of which has a file in `search.data.sources`.

    Attributes:
        timm: Name of a timm model.
        torchvision: Name of a torchvision model.
        onnx: A float ONNX file, relative to the config file.
        tflite: A float TensorFlow Lite file, relative to the config file.
        exported: A file of ``torch.export.save``, relative to the config file.
        factory: ``module:callable`` that returns an ``nn.Module``.
        weights: ``pretrained`` (fetched; the default), or a state-dict file, relative to the
            config file.
        args: Keyword arguments of the factory, or of what makes the named model.
    """

    timm: str | None = None
    torchvision: str | None = None
    onnx: str | None = None
    tflite: str | None = None
    exported: str | None = None
    factory: Factory | None = None
    weights: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)

    @property
    def source(self) -> str:
        """Which of `MODEL_KEYS` is given."""
        return next(key for key in MODEL_KEYS if getattr(self, key) is not None)

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        given = [key for key in MODEL_KEYS if getattr(self, key) is not None]
        if len(given) != 1:
            found = f"; found {' and '.join(given)}" if given else ""
            raise ValueError(f"needs one of {', '.join(MODEL_KEYS)}{found}")
        if self.weights is not None and given[0] not in NAMED_MODELS:
            named = " or ".join(NAMED_MODELS)
            raise ValueError(f"weights go with {named}; {given[0]} has its own")
        return self


MODEL_KEYS = tuple(key for key in ModelConfig.model_fields if key not in ("weights", "args"))
"""Keys of ``model:`` of which each is a source of networks."""
NAMED_MODELS = ("timm", "torchvision")
"""Sources that know a network by name, to which weights are given."""


class DataConfig(Section):
    """The images: a factory, or one of the built-in sources.

    Attributes:
        factory: ``module:callable`` that returns an object with ``calibration``, ``evaluation``
            and ``training``.
        args: Keyword arguments of the factory.
        imagefolder: Folder of images, in sub-folders by class, or flat where there are no labels.
        csv: Table ``file,label`` of images in ``images``; ``file,text`` for ocr; numbers as labels for regression.
        images: Folder that the files of ``csv``, ``coco``, ``yolo``, ``voc``, ``masks`` or ``pairs`` are relative to.
        npz: Archive of ``x``, (N, C, H, W) float or (N, H, W, C) uint8, and ``y``, (N,) integers.
        coco: Annotations in COCO's JSON format: boxes, for segmentation their polygons or run lengths, for keypoints
            objects cut out with their points.
        yolo: Folder of YOLO text labels, one file for each image; polygons for segmentation, poses for keypoints.
        voc: Folder of Pascal VOC's XML files.
        masks: Folder of mask images, called as the images, of class indices; 255 is left out.
        pairs: List of pairs of faces as LFW has it; images are ``NAME/NAME_0001.jpg``.
        digits: Side in pixels of scikit-learn's handwritten digits.
        names: Of the classes, for the report: a list, or a file (YAML with ``names``, or a name in each line).
        frames: Video only: frames of a sequence that the network reads at once.
        calibration: How many images calibrate; the others evaluate. None: 300, or a quarter where
            there are few.
        evaluation: At most how many images evaluate. None: all others.
        seed: Of the shuffle that splits the images.
        size: Side of the square that the network reads, in pixels; or [height, width], to which images are stretched.
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
    voc: str | None = None
    masks: str | None = None
    pairs: str | None = None
    digits: int | None = Field(default=None, ge=8, le=512)
    names: list[str] | str | None = None
    frames: int | None = Field(default=None, ge=1)
    calibration: int | None = Field(default=None, ge=1)
    evaluation: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    size: Side | tuple[Side, Side] | None = None
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
        if (self.images is not None) != (given[0] in BESIDE_IMAGES):
            listed = ", ".join(BESIDE_IMAGES)
            raise ValueError(f"images (a folder) goes with {listed}, which need it")
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
