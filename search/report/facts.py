"""How a run was measured and how to repeat it, in sentences, for every form of the report."""

from __future__ import annotations

from search.job import IN_MEMORY
from search.report.file_facts import file_warnings, in_float
from search.report.verdict import luck
from search.results import Results


def commands(results: Results) -> list[str]:
    """What to type to have the same run, and its best plan as a file."""
    config, folder = results.facts["config"], results.folder
    best = (results.best().plan if results.front.points else "") or "best"
    options = results.facts.get("options") or {}
    if config == IN_MEMORY:
        call = ", ".join(f"{key}={options[key]}" for key in ("trials", "seed") if key in options)
        return [
            f"result = quantfix.optimize(model, ..., out={str(folder)!r}, {call})",
            f'result.export("{folder}/export", pick="{best}")',
        ]
    given = [f" --{key} {options[key]}" for key in ("trials", "seed") if key in options]
    return [
        f"quantfix run {config} --out {folder}{''.join(given)}",
        f'quantfix export {folder} --pick "{best}"',
    ]


def measured(results: Results) -> list[str]:
    """On what, by what and how the numbers were made, a sentence each."""
    facts = results.facts
    unit = (
        "mean KL divergence of the int8 from the float class distribution, in nats"
        if facts["task"] == "classification"
        else "by what the outputs mean, averaged over output groups"
    )
    taken = "; ".join(facts.get("outputs", ()))
    return [
        f"{results.samples} evaluation and {facts['calibration_samples']} calibration samples.",
        *_chosen(results),
        f"Target {facts['target']}; int8 outputs computed by {facts['engine']}.",
        "Intervals: 95 %, bootstrap of (int8 - float) on the same samples, added to the float "
        f"{results.metric}.",
        f"Damage: {unit}.",
        *([f"Outputs were taken for: {taken}."] if taken else []),
        "MACs: convolutions, linear layers and matrix products of one input; batch norm and "
        "element-wise operations are not counted.",
        *_in_int8(results),
        f"{len(results.scores)} plans scored, objective {results.objective}; {_limits(results)}.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".",
    ]


def _chosen(results: Results) -> list[str]:
    """On which images the plans were chosen, and what those say that were held back."""
    if not results.held_back:
        return []
    choosing = int(results.facts["samples"]) - results.held_back
    if not results.is_confirmed:
        return [
            f"All on the {choosing} images that choose; {results.held_back} are held back yet."
        ]
    gone = len(results.overtaken())
    said = f"Plans were chosen on {choosing} images and confirmed on {results.held_back} others; "
    said += f"{gone} of the chosen plans are beaten on all images and left out." if gone else ""
    said = said if gone else said + "none of the chosen plans is beaten on all images."
    return [said, luck(results)]


def _in_int8(results: Results) -> list[str]:
    """What the best plan's file computes in int8."""
    best = results.best() if results.front.points else results.empty()
    if best is None or best.int8_share is None:
        return []
    said = f"The best plan's file computes {best.int8_share:.1%} of its MACs in int8. "
    return [(said + in_float(best)).strip(), *file_warnings(results)]


def _limits(results: Results) -> str:
    words = {
        "macs": lambda v: f"at most {v / 1e6:.1f} M MACs",
        "params": lambda v: f"at most {v / 1e6:.3f} M parameters",
        "weight_bytes": lambda v: f"at most {v:.0f} bytes of weights",
        "float_layers": lambda v: f"at most {v:.0f} layer{'' if v == 1 else 's'} in float",
        "float_islands": lambda v: f"at most {v:.0f} groups of them",
        "latency_ms": lambda v: f"at most {v:g} ms for one input on this machine",
        "latency_ratio": lambda v: f"at most {v:g} times the time of plain int8",
    }
    limits = results.limits
    said = [word(limits[key]) for key, word in words.items() if limits.get(key) is not None]
    return ", ".join(said) or "no limits"
