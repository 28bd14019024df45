"""What a sensitivity analysis found, and its JSON form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rewriter.sensitivity.causes import Cause
from rewriter.sensitivity.screen import Screening


@dataclass(frozen=True)
class LayerDamage:
    """One weighted layer alone in int8: its weight, what it reads and, for a head, its result.

    Args:
        layer: qualified name of the user's module; ``node`` is its name in the graph.
        kind: depthwise, pointwise, conv, linear, ...
        macs: per input.
        damage: measured where ``exact``, otherwise screened; ``screened`` is the estimate in any
            case.
        metric: of the network with this layer alone in int8; None where only screened.
        drop: what that loses to float; None where only screened.
        sqnr_db: signal to int8 noise at the outputs; where only screened, from the damage.
        causes: names, the strongest first; ``evidence`` has their numbers.
        answers: steps that touch this layer, free ones first; ``answer_macs`` is what each adds.
        weight_damage: screened, of rounding the weight alone.
        input_damage: screened, of rounding the input alone.
        samples: on how many inputs it was measured; 0 where only screened.
        interval: 95 % interval of ``damage`` over inputs; None where there was one alone.
    """

    layer: str
    node: str
    kind: str
    macs: int
    damage: float
    screened: float
    exact: bool
    metric: float | None
    drop: float | None
    sqnr_db: float | None
    weight_damage: float
    input_damage: float
    samples: int
    interval: tuple[float, float] | None = None
    causes: tuple[str, ...] = ()
    evidence: tuple[Cause, ...] = ()
    answers: tuple[str, ...] = ()
    answer_macs: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "layer": self.layer,
            "node": self.node,
            "kind": self.kind,
            "macs": self.macs,
            "damage": _short(self.damage),
            "metric": self.metric,
            "drop": self.drop,
            "sqnr_db": None if self.sqnr_db is None else round(self.sqnr_db, 2),
            "causes": list(self.causes),
            "answers": list(self.answers),
            "exact": self.exact,
            "screened": _short(self.screened),
            "weight_damage": _short(self.weight_damage),
            "input_damage": _short(self.input_damage),
            "samples": self.samples,
            "interval": None if self.interval is None else [_short(v) for v in self.interval],
            "evidence": [c.to_dict() for c in self.evidence],
            "answer_macs": list(self.answer_macs),
        }


@dataclass(frozen=True)
class ValueDamage:
    """One activation tensor alone in int8, for all that read it.

    Args:
        value: its name in the graph; ``layer`` is the layer that makes it, "" for an input or
            another operation.
        low: lower end of its range.
        high: upper end of its range.
        channels: those that set the range, the widest first.
        spread: width of the widest channel relative to the one in the middle.
        feeds: layers that read it in int8.
        damage: screened.
    """

    value: str
    layer: str
    low: float
    high: float
    channels: tuple[int, ...]
    spread: float
    feeds: tuple[str, ...]
    damage: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "value": self.value,
            "layer": self.layer,
            "range": [_short(self.low), _short(self.high)],
            "channels": list(self.channels),
            "spread": _short(self.spread),
            "feeds": list(self.feeds),
            "damage": _short(self.damage),
        }


@dataclass(frozen=True)
class Interaction:
    """One layer seen from both ends: alone in int8, and alone in float.

    Args:
        alone: damage with this layer alone in int8.
        gain: what the fully quantized network's damage falls by when this layer is left in float.
        measured: both were measured; otherwise both were predicted by the screening.
        disagrees: one is more than twice the other, and not both are small.
    """

    layer: str
    alone: float
    gain: float
    measured: bool
    disagrees: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "layer": self.layer,
            "alone": _short(self.alone),
            "gain": _short(self.gain),
            "measured": self.measured,
            "disagrees": self.disagrees,
        }


@dataclass(frozen=True)
class CurvePoint:
    """The network in int8 with the first ``float_layers`` of the ranking left in float."""

    float_layers: int
    layer: str
    damage: float
    metric: float | None
    measured: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "float_layers": self.float_layers,
            "layer": self.layer,
            "damage": _short(self.damage),
            "metric": self.metric,
            "measured": self.measured,
        }


@dataclass(frozen=True)
class Baseline:
    """Metric and damage of the network as it is."""

    float: float | None
    int8: float | None
    macs: int
    damage: float


@dataclass(frozen=True)
class Analysis:
    """The layers of one network, most harmful first, and what is known about each.

    Args:
        samples: on how many inputs the network in int8 was measured.
        layers: exactly the quantized weighted layers.
        values: activation tensors, most harmful first.
        interaction: of the first layers.
        curve: damage as ever more of the first layers are left in float.
        screening: projections that price any further change without running the network.
    """

    target: str
    metric: str
    higher_is_better: bool
    samples: int
    baseline: Baseline
    layers: list[LayerDamage]
    values: list[ValueDamage]
    interaction: list[Interaction]
    curve: list[CurvePoint]
    screening: Screening

    def to_json(self) -> dict[str, Any]:
        """The content of sensitivity.json; equal for equal inputs and seed."""
        b = self.baseline
        return {
            "format": 1,
            "target": self.target,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "samples": self.samples,
            "screened_samples": self.screening.samples,
            "baseline": {
                "float": b.float,
                "int8": b.int8,
                "macs": b.macs,
                "damage": _short(b.damage),
            },
            "layers": [x.to_dict() for x in self.layers],
            "values": [x.to_dict() for x in self.values],
            "interaction": [x.to_dict() for x in self.interaction],
            "curve": [x.to_dict() for x in self.curve],
        }


def _short(number: float) -> float:
    return float(f"{number:.6g}")
