"""Arguments and options that commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

KINDS = (
    "classification",
    "detection",
    "video",
    "segmentation",
    "keypoints",
    "regression",
    "ocr",
    "embedding",
    "custom",
    "unlabelled",
)
"""Tasks that ``quantfix init`` writes a start for."""


class Plans(StrEnum):
    """Which plans are fine-tuned."""

    knee = "knee"
    best = "best"
    every = "all-front"
    none = "none"


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
FixPath = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", help="YAML file of the run, or an .onnx or .tflite file with --images."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="With an .onnx or .tflite file: images to calibrate and to judge on."
    ),
]
Target = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="With an .onnx or .tflite file: the int8 profile."),
]
Shape = Annotated[
    str | None,
    typer.Option(metavar="C,H,W", help="With an .onnx file that leaves it open: its input."),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B", help="With an .onnx or .tflite file: subtracted from pixels in [0, 1]."
    ),
]
Std = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="With an .onnx or .tflite file: divided by.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Run directory.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Run directory. Default: runs/NAME OF THE CONFIG."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]
Full = Annotated[
    bool, typer.Option("--full", help="All columns, and the exact text of each plan.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the search and the fits.")]
Trials = Annotated[
    int | None, typer.Option(min=1, help="Plans to score in all, those of earlier runs included.")
]
Timeout = Annotated[
    float | None, typer.Option(min=0, metavar="SECONDS", help="Begin no plan after so long.")
]
Workers = Annotated[int | None, typer.Option(min=1, max=64, help="Processes that search.")]
MaxDrop = Annotated[
    float | None, typer.Option(min=0, metavar="POINTS", help="Largest loss against float.")
]
MaxDamage = Annotated[
    float | None,
    typer.Option(min=0, metavar="DAMAGE", help="Largest distance to float; needs no labels."),
]
MaxMacs = Annotated[
    float | None, typer.Option(min=0, metavar="RATIO", help="Largest cost; 1: as it is.")
]
Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Optuna storage; default: a journal in the run directory."),
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="auto|ADDRESS", help="Ray cluster on which the workers run."),
]
Pictures = Annotated[
    bool, typer.Option("--pictures", help="Draw the network, for which it is loaded.")
]
Tuned = Annotated[
    Plans | None,
    typer.Option("--finetune", help="Train these plans after the search; finetune: in CONFIG."),
]
