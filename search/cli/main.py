"""The command ``quantfix``: what can be typed. What it does is in `search.cli.commands`.

torch takes seconds to import, so that nothing here imports it: help and misspelt options are answered without it.
"""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.logging import RichHandler

from search.cli.console import err, refused, say
from search.cli.options import (
    KINDS,
    ConfigPath,
    FixPath,
    Full,
    Images,
    MaxDamage,
    MaxDrop,
    MaxMacs,
    Mean,
    Out,
    Pictures,
    Quiet,
    Ray,
    RunFolder,
    Seed,
    Shape,
    Std,
    Storage,
    Target,
    Timeout,
    Trials,
    Tuned,
    Workers,
)

INTERRUPTED = 130

app = typer.Typer(
    name="quantfix",
    help="Find the layers of a vision network that int8 breaks, and rewrite around them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run a command; exit 0, 1 (goal not met), 2 (bad input, one message) or 130 (interrupted)."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_path=False, show_time=False)],
    )
    try:
        app()
        code = 0
    except SystemExit as stop:  # typer has spoken itself: help, a misspelt option, or an exit code
        code = stop.code if isinstance(stop.code, int) else 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        code = refused(f"{place}{error.strerror or error}")
    except Exception as error:
        from rewriter import RewriteError
        from search.config.schema import ConfigError
        from search.engines import EngineError
        from search.run_dir.files import RunError

        if not isinstance(error, ConfigError | EngineError | RewriteError | RunError):
            raise
        code = refused(str(error), error)
    if code == INTERRUPTED:
        again = shlex.join(["quantfix", *sys.argv[1:]])
        say(f"\nstopped; nothing is lost. To go on: {again}", err)
    sys.exit(code)


@app.command()
def init(
    kind: Annotated[str, typer.Argument(metavar="|".join(KINDS), help="The task.")],
    out_dir: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where to; the current folder.")
    ] = Path(),
    name: Annotated[str, typer.Option(help="Of the two files.")] = "mine",
) -> None:
    """A commented config and a file of code to fill in. Overwrites nothing.

    Example: quantfix init classification
    """
    from search.cli.init import write_start

    for path in write_start(kind, out_dir, name):
        say(f"written: {path}")


@app.command()
def check(config: ConfigPath, quiet: Quiet = False) -> None:
    """Load, trace and run the float network; say what it costs and what is wrong. Changes nothing.

    Example: quantfix check configs/digits.yaml
    """
    from search.cli import commands

    commands.check(config, quiet)


@app.command()
def analyze(
    config: ConfigPath,
    exact: Annotated[bool, typer.Option("--exact", help="Measure every layer.")] = False,
    out_dir: Out = None,
    full: Full = False,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """Which layers int8 breaks, why, and which rules answer them. Writes DIR/sensitivity.json, .svg.

    Example: quantfix analyze configs/digits.yaml
    """
    from search.cli import commands

    commands.analyze(config, exact, out_dir, quiet, seed, full)


@app.command()
def sites(config: ConfigPath, quiet: Quiet = False) -> None:
    """Every place where a rule may act, what it would cost, and near misses with the reason.

    Example: quantfix sites configs/digits.yaml
    """
    from search.cli import commands

    commands.sites(config, quiet)


@app.command()
def run(
    config: ConfigPath,
    out_dir: Out = None,
    trials: Trials = None,
    timeout: Timeout = None,
    workers: Workers = None,
    storage: Storage = None,
    ray: Ray = None,
    tuned: Tuned = None,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """The whole job: check, analyze, fit, search, report. The same command again resumes.

    Example: quantfix run configs/digits.yaml --trials 30
    """
    from search.cli import commands

    commands.run(
        config, out_dir, trials, timeout, workers, storage, ray, tuned, quiet=quiet, seed=seed
    )


@app.command()
def demo(trials: Trials = None, out_dir: Out = None, quiet: Quiet = False) -> None:
    """The whole job on handwritten digits that come with scikit-learn; no download.

    Example: quantfix demo
    """
    from search.cli import commands
    from search.config.schema import shipped_config

    commands.run(shipped_config("digits.yaml"), out_dir, trials, quiet=quiet)


@app.command()
def table(
    config: ConfigPath,
    out_dir: Out = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of each training; default: finetune.steps.")
    ] = None,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """What replacing only the first depthwise separable convolution is worth. Writes DIR/table.json.

    In float and int8, as it is and trained, relative to float = 100, with controls that lack the rewrite.

    Example: quantfix table configs/video_digits.yaml
    """
    from search.cli import finetune_commands

    finetune_commands.table(config, out_dir, steps, quiet, seed)


@app.command()
def worker(folder: RunFolder, storage: Storage = None, quiet: Quiet = False) -> None:
    """Be one more worker of a running search, wherever its run directory is seen.

    Example: quantfix worker runs/digits
    """
    from search.cli import commands

    commands.worker(folder, storage, quiet)


@app.command()
def front(
    folder: RunFolder, pictures: Pictures = False, full: Full = False, quiet: Quiet = False
) -> None:
    """The Pareto front as a plot and a table. Writes DIR/front.json, report.html and report.md.

    Example: quantfix front runs/digits
    """
    from search.cli import commands

    commands.front(folder, pictures, quiet, full)


@app.command()
def recipe(
    folder: RunFolder,
    file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Default: recipes/NAME OF THE CONFIG.yaml."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """The plans of a run's front as a recipe, for other weights of the same architecture.

    Example: quantfix recipe runs/digits
    """
    from search.cli import recipe_command

    recipe_command.recipe(folder, file, quiet)


@app.command()
def export(
    folder: RunFolder,
    pick: Annotated[
        str, typer.Option(metavar='best|knee|plain|NUMBER|"macs<=R"|"PLAN"', help="Which plan.")
    ] = "best",
    out_dir: Annotated[
        Path | None, typer.Option("--out", metavar="DIR2", help="Default: DIR/export.")
    ] = None,
    compared: Annotated[
        bool,
        typer.Option("--compare", help="Compare simulation and runtime value by value."),
    ] = False,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="A fine-tuned plan as it was before.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Trained weights of the plan's architecture (quantfix.rewrite)."
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="onnx,tflite,openvino,trt",
            help="Int8 files in these forms too, each run and measured.",
        ),
    ] = "",
    quiet: Quiet = False,
) -> None:
    """The chosen network: int8 ONNX, float source and weights, ranges, and what changed.

    A plan that was fine-tuned is shipped with its trained weights.

    Example: quantfix export runs/digits --pick knee
    """
    from search.cli import commands

    commands.export(folder, pick, out_dir, compared, untrained, weights, quiet, to)


@app.command()
def devices(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Price its plain int8 file.")
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.csv", help="Write its kernels.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Tables of kernel times: which there are, and the kernels of a network to measure on a device.

    Example: quantfix devices

    Example for a device of your own: quantfix devices configs/digits.yaml --out kernels.csv
    """
    from search.cli.devices import devices as listed

    listed(config, out_file, quiet)


@app.command()
def fix(
    config: FixPath,
    max_drop: MaxDrop = None,
    max_macs: MaxMacs = None,
    max_damage: MaxDamage = None,
    out_dir: Out = None,
    trials: Trials = None,
    timeout: Timeout = None,
    workers: Workers = None,
    storage: Storage = None,
    images: Images = None,
    target: Target = None,
    shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """The cheapest plan that meets both goals, in DIR/fixed; exit 1 and the best if none does.

    Example: quantfix fix configs/digits.yaml --max-drop 1 --max-macs 1.1

    Example without a config: quantfix fix model.onnx --images DIR
    """
    from search.cli import commands

    commands.fix(
        config,
        max_drop,
        max_macs,
        max_damage,
        out_dir,
        trials,
        timeout,
        workers,
        storage,
        quiet,
        seed,
        images,
        target,
        shape,
        mean,
        std,
    )
