"""What the files of a run compute in int8, in sentences: a layer may run in float that nobody asked to keep there."""

from __future__ import annotations

from collections.abc import Mapping

from search.results import Results
from search.run_dir.scores import Score

# Layers that are named, and kinds of operators.
NAMED = 4
DEFAULT_INT8_SHARE = 0.95  # where a run was noted before the config could say it


def wanted_share(results: Results) -> float:
    """The share of the MACs that should run on int8 kernels."""
    options: Mapping[str, object] = results.facts.get("options") or {}
    value = options.get("min_int8_share", DEFAULT_INT8_SHARE)
    return float(value) if isinstance(value, (int, float)) else DEFAULT_INT8_SHARE


def file_warnings(results: Results) -> list[str]:
    """A sentence for plain int8 and for the best plan, where their files compute too little in int8."""
    wanted, empty = wanted_share(results), results.empty()
    chosen = [] if empty is None else [empty]
    if results.front.points and results.best().plan:
        chosen.append(results.best())
    return [
        f"Warning: {_named(score)} computes {score.int8_share:.1%} of its MACs in int8, less than "
        f"{wanted:.0%} (search.min_int8_share). {in_float(score)}"
        for score in chosen
        if score.int8_share is not None and score.int8_share < wanted
    ]


def in_float(score: Score) -> str:
    """Which layers and operators of a plan's file run in float, and why."""
    return told_of_float(score.float_reasons or {}, score.float_ops or {})


def told_of_float(reasons: Mapping[str, str], operators: Mapping[str, int]) -> str:
    """Layers by reason, then operators by number; "" where nothing runs in float."""
    said: list[str] = []
    for reason in dict.fromkeys(reasons.values()):
        layers = [name for name, why in reasons.items() if why == reason]
        more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
        said.append(f"{', '.join(layers[:NAMED])}{more}: {reason}")
    counts = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
    if counts:
        said.append("operators in float: " + ", ".join(f"{kind} {n}" for kind, n in counts))
    return "; ".join(said) + "." if said else ""


def _named(score: Score) -> str:
    return "the file of plain int8" if not score.plan else f'the file of "{score.plan}"'
