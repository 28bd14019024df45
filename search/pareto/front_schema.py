"""The schema of ``front.json``: what each field means; ``docs/front.schema.json`` is made from it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Interval = tuple[float, float]


_SHARE: Any = Field(None, description="share of the file's MACs that int8 kernels compute")
_FLOAT_OPS: Any = Field(
    None, description="how many operators of each kind run in float in the file"
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Measured(_Part):
    """A plan on a part of the samples."""

    samples: int
    float_: float | None = Field(
        alias="float", description="metric of the network as it is, in float"
    )
    int8: float | None = Field(description="metric of this plan's int8 network")
    int8_interval: Interval | None
    damage: float | None


class Deployed(_Part):
    """A plan on a runtime that ships it."""

    int8: float | None
    damage: float | None


class StepEntry(_Part):
    """One step of a plan: the difference of two scored plans, of which one has this step more."""

    step: str = Field(description="rule@anchor; several that were only scored together")
    macs: int | None = Field(description="what it adds per input")
    damage: float | None = Field(description="change of the damage, negative is better")
    metric: float | None = Field(description="change of the metric, as a fraction")
    beside: int | None = Field(
        description="how many other steps both plans have; null: not measured apart from the others"
    )


class Point(_Part):
    """One plan."""

    plan: str = Field(description="its text; empty for the network as it is")
    summary: str = Field(description="the plan in words")
    macs: int = Field(description="multiply-accumulates per input")
    macs_ratio: float = Field(description="relative to the network as it is")
    params: int
    weight_bytes: int = Field(description="of the stored weights under the target")
    float_layers: int = Field(description="layers with weights that stay in float")
    float_islands: int = Field(description="connected groups of them")
    int8_share: float | None = _SHARE
    float_ops: dict[str, int] | None = _FLOAT_OPS
    latency_ms: float | None = Field(description="median for one input, where it was asked for")
    predicted_ms: float | None = Field(
        None, description="for one input on one thread, by the table of kernels"
    )
    latency_ratio: float | None = Field(None, description="that, relative to plain int8")
    bytes: int | None = Field(None, description="of the file")
    bytes_moved: int | None = Field(None, description="read and written by all its kernels")
    int8_macs: int | None = Field(None, description="MACs of its kernels on integers")
    float_macs: int | None = Field(None, description="MACs of its kernels on floats")
    operators: int | None = Field(None, description="kernels that run")
    reorders: int | None = Field(
        None, description="of these, kernels that only change the layout of values"
    )
    int8: float | None = Field(description="metric of the int8 network, null without labels")
    int8_interval: Interval | None = Field(
        description="95 %, paired with float on the same samples"
    )
    float_: float | None = Field(
        alias="float", description="metric of the rewritten network in float"
    )
    damage: float | None = Field(description="distance to the float network, lower is better")
    engine: str = Field(description="what computed the int8 outputs: a runtime, or simulate")
    engine_version: str = Field("", description="version of that runtime")
    samples: int
    steps: list[StepEntry] = Field(description="what each step costs and gains")
    selection: Measured | None = Field(
        None, description="on the samples that choose, once confirmed"
    )
    confirmation: Measured | None = Field(
        None, description="on the samples held back, once confirmed"
    )
    confirmed: dict[str, Deployed] = Field(
        default_factory=dict,
        description="by engine: what the runtimes that ship the target measured, on all samples",
    )
    finetuned: dict[str, Any] | None = Field(
        None, description="what training made of it, if it was trained"
    )


class ControlEntry(_Part):
    """A plan that saves by one knob for the whole network: what the front has to beat."""

    macs_ratio: float
    int8: float | None
    damage: float | None
    how: str = Field(description="lower resolution, or uniform thinning")
    plan: str


class BaselineEntry(_Part):
    """The network as it is."""

    float_: float | None = Field(alias="float")
    int8: float | None
    int8_interval: Interval | None
    macs: int
    damage: float | None
    int8_share: float | None = _SHARE
    float_ops: dict[str, int] | None = _FLOAT_OPS


class FrontFile(_Part):
    """``front.json``, format 1. A field may be added within a format; its meaning never changes."""

    format: Literal[1] = Field(description="raised when a field changes its meaning or goes")
    target: str
    metric: str = Field(description="top1, ap, auc: a fraction of 1")
    higher_is_better: bool
    objective: Literal["metric", "damage"] = Field(description="what plans were chosen by")
    samples: int = Field(description="that the numbers of the front are of")
    selection_samples: int = Field(description="that choose among plans; the others are held back")
    confirmed: bool = Field(
        description="whether every plan of the front was run on those held back"
    )
    cost: str = Field(description="macs, params, weight_bytes, latency or bytes")
    engine: str
    baseline: BaselineEntry
    limits: dict[str, float | None] = Field(description="what a plan on the front must meet")
    points: list[Point] = Field(
        description="the front, cheapest first; each is better than all cheaper ones beyond the noise"
    )
    ties: list[Point] = Field(description="cannot be told from a point on these samples")
    overtaken: list[str] = Field(description="plans that fell off the front when confirmed")
    references: list[Point] = Field(description="plain int8, and the most harmful layers in float")
    control: list[ControlEntry] = Field(description="what plans that cost less are compared with")
    separable: int = Field(description="points that differ from the one before beyond the noise")
    best: str | None = Field(description="plan with the best int8 quality")
    knee: str | None = Field(description="plan after which more compute buys little")
    hypervolume: float
    control_hypervolume: float = Field(0.0, description="of the control alone")
    hypervolume_reference: tuple[float, float]
    plans_scored: int
    plans_failed: int
    failures: dict[str, int]
    plans_stopped: int = Field(description="given up early, clearly not on the front")


def front_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of ``front.json``."""
    found = FrontFile.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}
