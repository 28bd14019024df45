"""Which answers a cause names, and in which order they come."""

from __future__ import annotations

import pytest
from torch import nn

from rewriter import RULES, quantize, target
from rewriter.graph.lookup import find
from rewriter.sensitivity import THRESHOLDS
from rewriter.sensitivity.causes import Cause
from rewriter.sensitivity.remedies import NAMED, find_answers
from tests.rules import check
from tests.rules.test_add_residual_weights import uneven
from tests.rules.test_replace_activation import two

NEW = (
    *("replace_activation_relu", "split_precision", "add_residual_weights", "float_gate"),
    *("fold_gate", "scale_norm", "float_trunk", "unmerge_rep", "phase_transpose"),
)


def test_every_cause_names_rules_of_the_catalog() -> None:
    assert NAMED.keys() == THRESHOLDS.keys()
    for cause, starts in NAMED.items():
        for start in starts:
            assert any(r.name.startswith(start) for r in RULES), f"{cause}: {start}"


@pytest.mark.parametrize("rule", NEW)
def test_every_such_rule_is_named_by_a_cause(rule: str) -> None:
    assert any(rule.startswith(start) for starts in NAMED.values() for start in starts)


def test_of_answers_that_cost_the_same_those_of_the_cause_come_first() -> None:
    gm = check.graph_of(uneven(two(nn.SiLU())), (3, 13, 10), "per_tensor").float()
    q = quantize(gm, target("per_tensor"), [check.inputs((3, 13, 10)).float()])
    layer = find(gm, "_0")
    plain = [s for s, _ in find_answers(q, [layer])["_0"]]
    cause = Cause("activation_outliers", 0.1, 0.5, "_1")
    named = [s for s, _ in find_answers(q, [layer], {"_0": (cause,)})["_0"]]
    assert sorted(plain) == sorted(named)
    assert plain[-1] == named[-1] == "keep_float@_0"
    first = named.index("replace_activation_relu@_0")
    assert first < named.index("correct_bias@model")
    assert {s.partition("@")[0] for s in named[: first + 1]} <= {
        *(
            "refine_ranges",
            "split_channels",
            "replace_activation_relu",
            "replace_activation_relu6",
        ),
        *("replace_activation_hardswish", "split_precision"),
    }
