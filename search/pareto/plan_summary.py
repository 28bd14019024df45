"""A plan in words: a dozen steps of one kind are one phrase."""

from __future__ import annotations

from rewriter.plan import Plan

# By a rule's name without numbers; {n} places, {numbers} of the rule's names.
_SAID = {
    "drop_dead_channels": "dead channels dropped at {n} place{s}",
    "thin_channels": "{n} layer{s} thinned",
    "lower_resolution": "images at {numbers} % of their side",
    "drop_block": "{n} block{s} dropped",
    "keep_float": "{n} layer{s} in float",
    "keep_int16": "{n} value{s} in 16 bits",
    "split_head": "outputs split in {numbers}",
    "split_head_auto": "outputs split",
    "split_head_named": "outputs split",
    "split_range": "channels split by range at {n} place{s}",
    "split_weights": "weights split by range at {n} place{s}",
    "float_tail": "the end in float",
    "refine_ranges": "better ranges",
    "equalize": "equalization",
    "correct_bias": "bias correction",
    "round_weights": "rounding",
}
# A table shows the text of a plan of up to so many steps, of longer ones the summary.
SHOWN = 8


def plan_summary(text: str) -> str:
    """What a plan does, in a few words.

    >>> plan_summary("thin_channels_50@a thin_channels_75@b split_head_3@c correct_bias@model")
    '2 layers thinned, outputs split in 3, bias correction'
    >>> plan_summary("")
    'the network as it is'
    """
    places: dict[str, list[str]] = {}
    for step in Plan.parse(text).steps:
        name, number = _split(step.rule)
        places.setdefault(name, []).append(number)
    order = list(_SAID)
    ranked = sorted(places, key=lambda n: order.index(n) if n in _SAID else -1)
    said = [_phrase(name, places[name]) for name in ranked]
    return ", ".join(said) or "the network as it is"


def short(text: str) -> str:
    """The text of a plan, or where it is long, its summary."""
    return text if len(text.split()) <= SHOWN else plan_summary(text)


def _split(rule: str) -> tuple[str, str]:
    name, _, last = rule.rpartition("_")
    return (name, last) if last.isdigit() else (rule, "")


def _phrase(name: str, numbers: list[str]) -> str:
    count = len(numbers)
    pattern = _SAID.get(name, f"{name.replace('_', ' ')} at {{n}} place{{s}}")
    each = ", ".join(sorted({n for n in numbers if n}))
    return pattern.format(n=count, s="" if count == 1 else "s", numbers=each)
