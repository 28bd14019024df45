"""Recipes: plans that proved good on an architecture, with which a search on other weights of it starts.

A recipe is a YAML file with the architecture's digest (structure and names, no weights), the target, and plans with
what they measured. ``quantfix recipe DIR`` writes one of a run; ``search: {recipe: FILE}`` tries its plans first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import fx

from rewriter import Plan, PlanError
from rewriter.storage import Digest
from search.config.messages import dotted
from search.config.schema import ConfigError
from search.run_dir.scores import Score
from search.strategy.schedule import Worth

log = logging.getLogger(__name__)


class Proven(BaseModel):
    """One plan and what it measured on the weights that the recipe is of."""

    model_config = ConfigDict(extra="forbid")

    plan: str
    summary: str = ""
    macs_ratio: float = 1.0
    int8: float | None = None
    damage: float | None = None


class Recipe(BaseModel):
    """The content of a recipe file."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    format: Literal[1]
    network: str
    architecture: str
    target: str
    metric: str
    samples: int
    float_: float | None = Field(alias="float")
    int8: float | None
    damage: float | None = None
    plans: list[Proven] = Field(min_length=1)


def architecture_digest(gm: fx.GraphModule) -> str:
    """Hash of a canonical graph without its weights: trainings of one network share it, also at other image sizes."""
    digest = Digest()
    digest.add(gm.code)
    digest.add([f"{n}={type(m).__name__}({m.extra_repr()})" for n, m in gm.named_modules() if n])
    return digest.hex()


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe for people to read and edit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = recipe.model_dump(by_alias=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=100), encoding="utf-8")


def read_recipe(path: Path, gm: fx.GraphModule, target: str) -> tuple[Plan, ...]:
    """The plans of a recipe, best first as the file has them.

    A recipe of another target is used all the same, with a warning: its splits and repairs are often as good there.

    Raises:
        ConfigError: the file cannot be read, is no recipe, or is of another architecture.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        recipe = Recipe.model_validate(content)
        plans = tuple(Plan.parse(p.plan) for p in recipe.plans)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"search.recipe: {path}: cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"search.recipe: {path}: not YAML") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = dotted(first["loc"]) or "the file"
        raise ConfigError(f"search.recipe: {path}: {where}: {first['msg']}") from error
    except PlanError as error:
        raise ConfigError(f"search.recipe: {path}: {error}") from error
    own = architecture_digest(gm)
    if recipe.architecture != own:
        raise ConfigError(
            f"search.recipe: {path}: is of another architecture ({recipe.network}, {recipe.architecture[:10]}); "
            f"this network is {own[:10]}"
        )
    if recipe.target != target:
        log.warning("search.recipe: %s: measured on %s, used on %s", path, recipe.target, target)
    return plans


def first(plans: Iterable[Plan], worth: Worth, admits: Callable[[Plan], bool]) -> Worth:
    """Plain int8 and the plans of a recipe that the limits admit, then what is worth trying otherwise.

    >>> dw = Plan.parse("keep_float@dw")
    >>> [str(p) for p in first([dw], lambda scores: [], lambda plan: True)({})]
    ['', 'keep_float@dw']
    """
    known = tuple(plans)

    def tried(scores: Mapping[str, Score]) -> list[Plan]:
        own = [p for p in (Plan(()), *known) if str(p) not in scores and admits(p)]
        return [*own, *worth(scores)]

    return tried
