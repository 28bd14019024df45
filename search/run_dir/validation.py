"""What ``run.json`` and a record must hold to be used: a file from elsewhere, or a damaged one, is refused in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from search.config.messages import dotted

T = TypeVar("T")
Count = Annotated[int, Field(ge=1)]
FORMAT = 1


class _Strict(BaseModel):
    """Types as they are written; keys that only people or a later version read are let pass."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class _Baseline(_Strict):
    float: float | None
    int8: float | None
    macs: Annotated[int, Field(ge=0)]
    damage: float | None
    interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    int8_share: float | None = None
    float_ops: dict[str, int] | None = None


class _Goal(_Strict):
    max_drop: float | None = None
    max_damage: float | None = None


class _Facts(_Strict):
    """Every key that is read again. One that is not there yet is no fault: a run may be at its start."""

    format: Annotated[int, Field(ge=1, le=FORMAT)] = FORMAT
    config: str = ""
    task: str = ""
    metric: str = ""
    higher_is_better: bool = True
    target: str = ""
    engine: str = ""
    samples: Count = 1
    selection_samples: Count = 1
    calibration_samples: Count = 1
    parts: dict[str, str] = Field(default_factory=dict[str, str])
    baseline: _Baseline | None = None
    objective: Literal["metric", "damage"] = "metric"
    limits: dict[str, float | None] = Field(default_factory=dict[str, "float | None"])
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    storage: str | None = None
    goal: _Goal | None = None
    places: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]] | None = None
    ladder: list[Annotated[list[Any], Field(min_length=3, max_length=3)]] | None = None


def fault_of_run(facts: Mapping[str, Any]) -> str:
    """What is wrong with the content of a ``run.json``; "" where nothing is."""
    later = facts.get("format")
    if isinstance(later, int) and later > FORMAT:
        return f"format {later}: written by a later version; this one reads format {FORMAT}"
    return _fault(_Facts, dict(facts))


def checked(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of values whose types are those that it declares.

    Raises:
        ValueError: they are not.
    """
    fault = _fault(_model_of(kind), dict(values))
    if fault:
        raise ValueError(fault)
    return kind(**values)


def _fault(kind: type[BaseModel], values: dict[str, Any]) -> str:
    try:
        kind.model_validate(values)
    except ValidationError as error:
        return _said(error)
    return ""


def _said(error: ValidationError) -> str:
    first = error.errors()[0]
    value = f"{first['input']!r}"[:60]
    message = first["msg"].removeprefix("Input ")
    return f"{dotted(first['loc'])}: {message}; is {value}"


@cache
def _model_of(kind: type[Any]) -> type[BaseModel]:
    """A model with the fields of a dataclass."""
    hints = get_type_hints(kind)
    declared: dict[str, Any] = {
        f.name: (hints[f.name], ... if f.default is MISSING else f.default) for f in fields(kind)
    }
    return create_model(kind.__name__, __config__=ConfigDict(strict=True), **declared)
