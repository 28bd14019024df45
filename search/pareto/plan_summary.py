"""A plan in words: a dozen steps of one kind are one phrase, and a single place is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from rewriter.graph import kind_of, layer_name, layers
from rewriter.plan import Plan

# Where a plan may act, in running order: name in the graph -> [the user's name of the layer, kind].
Places = Mapping[str, Sequence[str]]

# By a rule's name without numbers: at one place, and at several. {at} the layer, {block} "first block",
# {n} places, {s} their plural, {numbers} of the rule's names, {share} the range of them.
_SAID: dict[str, tuple[str, str]] = {
    "merge_linear_separable": ("{block} merged", "{n} blocks merged"),
    "merge_separable": ("{block} merged", "{n} blocks merged"),
    "fuse_expand": ("expansion of {block} fused", "{n} expansions fused"),
    "replace_block": ("{block} made one convolution", "{n} blocks made one convolution each"),
    "densify_depthwise": ("{at} made a grouped convolution", "{n} depthwise layers made grouped"),
    "drop_block": ("{block} dropped", "{n} blocks dropped"),
    "thin_channels": ("{at} thinned to {share} %", "{n} layers thinned to {share} %"),
    "lower_resolution": (
        "images at {numbers} % of their side",
        "images at {numbers} % of their side",
    ),
    "drop_dead_channels": ("dead channels of {at} dropped", "dead channels dropped at {n} places"),
    "keep_float": ("{at} in float", "{n} layers in float"),
    "keep_int16": ("{at} in 16 bits", "{n} values in 16 bits"),
    "float_tail": ("the end in float", "the end in float"),
    "split_head": ("outputs split in {numbers}", "outputs split in {numbers}"),
    "split_head_auto": ("outputs split", "outputs split"),
    "split_head_named": ("outputs split by meaning", "outputs split by meaning"),
    "split_cat": ("concatenation before {at} opened", "{n} concatenations opened"),
    "split_channels": ("outlier channels of {at} halved", "outlier channels halved at {n} places"),
    "split_range": ("{at} split by range", "{n} layers split by range"),
    "split_weights": ("weights of {at} split", "weights of {n} layers split"),
    "replace_activation_relu": ("ReLU behind {at}", "ReLU behind {n} layers"),
    "replace_activation_relu6": ("ReLU6 behind {at}", "ReLU6 behind {n} layers"),
    "replace_activation_hardswish": ("hard-swish behind {at}", "hard-swish behind {n} layers"),
    "scale_norm": ("{at} scaled", "{n} layer norms scaled"),
    "split_precision": ("{at} in two int8 parts", "{n} values in two int8 parts"),
    "add_residual_weights": ("weights of {at} in two parts", "weights of {n} layers in two parts"),
    "unmerge_rep": ("identity taken out of {at}", "identities taken out of {n} kernels"),
    "phase_transpose": ("{at} made phases", "{n} transposed convolutions made phases"),
    "fold_gate": ("gate {at} made a constant", "{n} gates made constants"),
    "float_gate": ("gate {at} in float", "{n} gates in float"),
    "float_trunk": ("residual sums in float", "sums of {n} trunks in float"),
    "replace_relu6": ("ReLU6 at {at} made ReLU", "{n} ReLU6 made ReLU"),
    "absorb_bias": ("constants moved into biases", "constants moved into biases"),
    "refine_ranges": ("better ranges", "better ranges"),
    "equalize": ("equalization", "equalization"),
    "correct_bias": ("bias correction", "bias correction"),
    "round_weights": ("rounding", "rounding"),
}
_UNKNOWN = ("{rule} at {at}", "{rule} at {n} places")
_ORDINALS = ("first", "second", "third", "fourth", "fifth")


def places_of(gm: fx.GraphModule) -> dict[str, list[str]]:
    """What `plan_summary` needs to name places: the layers of a network in running order."""
    return {n.name: [layer_name(n), kind_of(gm, n)] for n in layers(gm)}


def plan_summary(text: str, places: Places | None = None) -> str:
    """What a plan does, in a few words.

    Args:
        text: Of the plan.
        places: Of its network; without them places are called as in the plan.

    >>> plan_summary("thin_channels_50@a thin_channels_75@b split_head_3@c correct_bias@model")
    '2 layers thinned to 50-75 %, outputs split in 3, bias correction'
    >>> plan_summary("merge_separable@dw keep_float@stem", {"stem": ("conv_stem", "conv"), "dw": ("b.dw", "depthwise")})
    'first block merged, conv_stem in float'
    >>> plan_summary("")
    'the network as it is'
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for step in Plan.parse(text).steps:
        name, number = _split(step.rule)
        found.setdefault(name, []).append((step.anchor, number))
    order = list(_SAID)
    ranked = sorted(found, key=lambda n: order.index(n) if n in _SAID else -1)
    said = [_phrase(name, found[name], places or {}) for name in ranked]
    return ", ".join(said) or "the network as it is"


def step_summary(text: str, places: Places | None = None) -> str:
    """Some steps in words, each with its place: ``a.b thinned to 75 %; c in float``."""
    steps = text.split()
    return "; ".join(plan_summary(step, places) for step in steps) or plan_summary("")


def _split(rule: str) -> tuple[str, str]:
    name, _, last = rule.rpartition("_")
    return (name, last) if last.isdigit() else (rule, "")


def _phrase(name: str, steps: Sequence[tuple[str, str]], places: Places) -> str:
    at = steps[0][0]
    numbers = sorted({int(n) for _, n in steps if n})
    one, several = _SAID.get(name, _UNKNOWN)
    return (one if len(steps) == 1 else several).format(
        n=len(steps),
        at=places[at][0] if at in places else at,
        block=_block(at, places),
        numbers=", ".join(map(str, numbers)),
        share="-".join(map(str, dict.fromkeys((numbers[0], numbers[-1])))) if numbers else "",
        rule=name.replace("_", " "),
    )


def _block(at: str, places: Places) -> str:
    """Such as "first block", where the place is a depthwise layer of the network; else its name."""
    blocks = [name for name, (_, kind) in places.items() if kind == "depthwise"]
    if at not in blocks:
        return f"block at {places[at][0] if at in places else at}"
    number = blocks.index(at)
    if number == len(blocks) - 1 and number:
        return "last block"
    return f"{_ORDINALS[number]} block" if number < len(_ORDINALS) else f"block {number + 1}"
