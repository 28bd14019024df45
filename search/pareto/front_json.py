"""What ``front.json`` says of a plan, and of the network as it is; see ``schema.py``."""

from __future__ import annotations

from typing import Any

from search.pareto.plan_summary import Places, plan_summary
from search.run_dir.scores import Baseline, Score

PRICES = ("bytes", "bytes_moved", "int8_macs", "float_macs", "operators", "reorders")
"""What a file costs beside time, as `Score.price` has it."""


def point(score: Score, places: Places | None = None) -> dict[str, Any]:
    """A plan with what it costs and keeps; with `places` of its network, in the names of its layers."""
    return {
        "plan": score.plan,
        "summary": plan_summary(score.plan, places),
        "macs": score.macs,
        "macs_ratio": score.macs_ratio,
        "params": score.params,
        "weight_bytes": score.weight_bytes,
        "float_layers": score.float_layers,
        "float_islands": score.float_islands,
        "int8_share": score.int8_share,
        "float_ops": score.float_ops,
        "latency_ms": score.latency_ms,
        "predicted_ms": score.predicted_ms,
        "latency_ratio": score.latency_ratio,
        **{name: (score.price or {}).get(name) for name in PRICES},
        "int8": score.metric,
        "int8_interval": None if score.interval is None else list(score.interval),
        "float": score.metric_float,
        "damage": score.damage,
        "engine": score.engine,
        "engine_version": score.engine_version,
        "samples": score.samples,
    }


def baseline_of(baseline: Baseline) -> dict[str, Any]:
    """The network as it is, in float and in plain int8."""
    interval = None if baseline.interval is None else list(baseline.interval)
    return {
        "float": baseline.float,
        "int8": baseline.int8,
        "int8_interval": interval,
        "macs": baseline.macs,
        "damage": baseline.damage,
        "int8_share": baseline.int8_share,
        "float_ops": baseline.float_ops,
    }
