"""What an analysis found beside its ranking, in sentences: values that hurt, and layers that interact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewriter.sensitivity import THRESHOLDS

# A value with less than this share of the whole damage is not worth a sentence.
NOTED_SHARE = 0.1
MAX_VALUES = 5


def remarks(content: Mapping[str, Any]) -> list[str]:
    """Lines about the content of sensitivity.json, the most harmful first."""
    whole = content.get("simulated_baseline", content["baseline"])["damage"]
    harmful = [
        v
        for v in content.get("values", ())
        if whole and v["damage"] is not None and v["damage"] >= NOTED_SHARE * whole
    ]
    return [_value(v, whole) for v in harmful[:MAX_VALUES]] + [
        _interaction(x) for x in content.get("interaction", ()) if x["disagrees"]
    ]


def _value(value: Mapping[str, Any], whole: float) -> str:
    low, high = value["range"]
    about = [f"made by {value['layer']}"] if value["layer"] else []
    about += ["which ends in an output"] if value.get("ends") else []
    made = "".join(f", {said}" for said in about) + ("," if about else "")
    said = (
        f"value {value['value']}{made} does {value['damage']:.3g} damage alone, all of int8 {whole:.3g}: "
        f"range [{low:.4g}, {high:.4g}]"
    )
    if value["channels"] and value["spread"] >= THRESHOLDS["activation_channel_spread"]:
        plural = "s" if len(value["channels"]) > 1 else ""
        said += f" set by channel{plural} {', '.join(map(str, value['channels']))}"
        said += f", the widest {value['spread']:.3g} times the middle one"
    if value["feeds"]:
        said += f"; read by {', '.join(value['feeds'])}"
    return said


def _interaction(found: Mapping[str, Any]) -> str:
    how = "" if found["measured"] else ", as predicted"
    gain = found["gain"]
    effect = f"takes {gain:.3g} away" if gain >= 0 else f"adds {-gain:.3g}"
    return (
        f"layer {found['layer']} interacts with others{how}: alone in int8 it does "
        f"{found['alone']:.3g} damage, and leaving it in float {effect}"
    )
