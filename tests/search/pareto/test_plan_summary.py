"""Plans in words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewriter import RULES, trace
from search.pareto.plan_summary import places_of, plan_summary, step_summary

PLACES = {
    "stem": ["conv_stem", "conv"],
    "a_dw": ["blocks.0.dw", "depthwise"],
    "a_pw": ["blocks.0.pw", "pointwise"],
    "b_dw": ["blocks.1.dw", "depthwise"],
    "c_dw": ["blocks.2.dw", "depthwise"],
}


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("", "the network as it is"),
        ("merge_separable@a_dw", "first block merged"),
        ("merge_separable@b_dw", "second block merged"),
        ("replace_block@c_dw", "last block made one convolution"),
        ("merge_separable@elsewhere", "block at elsewhere merged"),
        ("merge_separable@a_dw merge_separable@b_dw", "2 blocks merged"),
        ("keep_float@stem", "conv_stem in float"),
        ("keep_float@stem keep_float@a_pw", "2 layers in float"),
        ("thin_channels_75@a_pw", "blocks.0.pw thinned to 75 %"),
        ("thin_channels_75@a_pw thin_channels_75@stem", "2 layers thinned to 75 %"),
        ("thin_channels_75@a_pw thin_channels_50@stem", "2 layers thinned to 50-75 %"),
        ("split_head_3@x correct_bias@model", "outputs split in 3, bias correction"),
    ],
)
def test_a_plan_is_said_in_words(plan: str, said: str) -> None:
    assert plan_summary(plan, PLACES) == said


def test_every_rule_has_words_and_no_pattern_is_left_open() -> None:
    for rule in RULES:
        for text in (f"{rule.name}@a_dw", f"{rule.name}@a_dw {rule.name}@b_dw"):
            said = plan_summary(text, PLACES)
            assert said
            assert not set("{}@_") & set(said), said


def test_what_changes_the_network_comes_before_what_tunes_it() -> None:
    said = plan_summary("round_weights@model keep_float@stem merge_separable@a_dw", PLACES)
    assert said == "first block merged, conv_stem in float, rounding"
    assert step_summary("keep_float@stem keep_float@a_pw", PLACES) == (
        "conv_stem in float; blocks.0.pw in float"
    )


def test_the_places_of_a_network_are_its_layers_in_running_order() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU()).eval()
    found = places_of(trace(model, torch.rand(1, 3, 8, 8)))
    assert [tuple(v) for v in found.values()] == [("0", "conv"), ("1", "depthwise")]
