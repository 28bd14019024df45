"""What outputs are taken for: told, or read off the graph, never off their size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import trace
from rewriter.damage import MeaningError, declared, measure_fidelity, output_names
from rewriter.damage.provenance import origins


class Head(nn.Module):
    """A map of 3 x 7 channels, laid out in several ways."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.conv, self.form = nn.Conv2d(3, 21, 3, padding=1), form
        self.one, self.fc = nn.Conv2d(3, 1, 1), nn.Linear(21, 6)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        n, _, h, w = y.shape
        if self.form == "map":
            return y
        if self.form == "rows":
            return y.flatten(2).permute(0, 2, 1)
        if self.form == "anchors":
            y = y.view(n, 3, 7, h, w).permute(0, 1, 3, 4, 2).reshape(n, -1, 7)
            return torch.cat([y[..., :4] * 64, y[..., 4:].sigmoid()], 2)
        if self.form == "positions":
            return self.one(x).permute(0, 2, 3, 1).reshape(n, -1, 1).sigmoid()
        if self.form == "columns":
            return torch.cat([y.flatten(2), self.one(x).flatten(2).sigmoid()], 1)
        if self.form == "row":
            z = self.fc(y.mean((2, 3)))
            return torch.cat([z[:, :4] * 64, z[:, 4:].sigmoid()], 1)
        if self.form == "softmax":
            return self.fc(y.mean((2, 3))).softmax(1)
        if self.form == "log_softmax":
            return torch.log_softmax(self.fc(y.mean((2, 3))), 1)
        if self.form == "unit":
            return nn.functional.normalize(self.fc(y.mean((2, 3))), dim=1)
        if self.form == "named":
            return {"boxes": y[:, :4], "more": [y[:, 4:].sigmoid(), self.fc(y.mean((2, 3)))]}
        return self.fc(y.mean((2, 3)))


X = torch.randn(8, 3, 6, 9, generator=torch.Generator().manual_seed(0))


def traced(form: str) -> Any:
    torch.manual_seed(1)
    return trace(Head(form).eval(), X[:2])


@pytest.mark.parametrize(
    ("form", "axis", "channels"),
    [
        ("map", 1, 21),
        ("rows", 2, 21),
        ("anchors", 2, 7),
        ("positions", 0, 1),
        ("columns", 1, 22),
        ("row", 1, 6),
        ("logits", 1, 6),
    ],
)
def test_the_axis_of_channels_follows_from_what_made_them(
    form: str, axis: int, channels: int
) -> None:
    (origin,) = origins(traced(form))
    assert (origin.axis, len(origin.channel)) == (axis, channels)
    assert len(set(origin.channel)) == channels


@pytest.mark.parametrize("form", ["anchors", "row", "columns"])
def test_scores_and_boxes_in_one_tensor_have_groups_of_their_own(form: str) -> None:
    judge = measure_fidelity(traced(form), [X], purpose="decoded")
    kinds = {g.kind for g in judge.groups}
    assert kinds == {"sigmoid", "coordinates" if form == "row" else "values"}
    scores = {"anchors": (4, 5, 6), "row": (4, 5), "columns": (21,)}[form]
    assert next(g.channels for g in judge.groups if g.kind == "sigmoid") == scores


def test_positions_are_no_groups() -> None:
    (group,) = measure_fidelity(traced("positions"), [X], purpose="decoded").groups
    assert (group.kind, group.axis, group.channels) == ("sigmoid", 0, ())


@pytest.mark.parametrize(
    ("form", "told", "assumed"),
    [
        ("logits", "logits", "logits"),
        ("softmax", "probabilities", "probabilities"),
        ("log_softmax", "logits", "logits"),
        ("unit", "logits", "embeddings"),
        ("row", "logits", "coordinates or so"),
    ],
)
def test_classes_by_task_and_by_assumption(form: str, told: str, assumed: str) -> None:
    gm = traced(form)
    task = measure_fidelity(gm, [X], purpose="classes")
    assert [g.kind for g in task.groups] == [told]
    assert not task.assumed
    alone = measure_fidelity(gm, [X])
    assert alone.assumed
    assert "(assumed)" in alone.about[0]
    if form != "row":
        assert [g.kind for g in alone.groups] == [assumed]
    else:  # a part of it went through a sigmoid: these are no classes
        assert {g.kind for g in alone.groups} == {"values", "sigmoid"}


def test_outputs_are_named_as_they_are_returned() -> None:
    gm = traced("named")
    assert output_names(gm) == ["boxes", "more.0", "more.1"]
    said = declared({"boxes": "coordinates", "more.1": "ignored"})
    judge = measure_fidelity(gm, [X], said, "decoded")
    assert [(g.output, g.kind) for g in judge.groups] == [(0, "coordinates"), (1, "sigmoid")]


def test_what_is_said_comes_first() -> None:
    said = declared([{"kind": "values", "groups": [[0, 1], [1, 6]]}])
    judge = measure_fidelity(traced("softmax"), [X], said, "classes")
    assert [(g.kind, g.channels) for g in judge.groups] == [
        ("values", (0,)),
        ("values", (1, 2, 3, 4, 5)),
    ]
    assert not judge.assumed


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("boxes", r"outputs: unknown: 'boxes'; known: logits, "),
        ([], r"outputs: must be a list"),
        (3, r"outputs: must be a list"),
        ({}, r"outputs: is empty"),
        ([3], r"outputs\[0\]: must be a word or a mapping"),
        ([{"kind": "values", "group": []}], r"outputs\[0\]: unknown key: 'group'"),
        ([{"groups": [[0, 4]]}], r"outputs\[0\].groups\[0\]: kind is missing"),
        ([{"kind": "values", "groups": [[4, 4]]}], r"groups\[0\]: holds no channel: \[4, 4\]"),
        ([{"kind": "values", "groups": [[0, 4], [3, 5]]}], r"channel 3 is in two groups"),
        ([{"kind": "values", "groups": [4]}], r"groups\[0\]: must be \[first, last \+ 1\]"),
        ([{"kind": "values", "axis": 0}], r"axis: must be 1 or more"),
        ([{"axis": 1}], r"needs kind, groups, or both"),
        (["ignored"], r"all are ignored"),
    ],
)
def test_what_cannot_be_read_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(MeaningError, match=message):
        declared(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["values", "values"], r"2 listed, but the network returns 1: 0"),
        ({"scores": "sigmoid"}, r"outputs.scores: no such output; there are 0"),
        ([{"kind": "values", "groups": [[0, 7]]}], r"channel 6: axis 1 of \(N, 6\) has 6"),
        ([{"kind": "values", "axis": 2}], r"axis 2: the shape is \(N, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(MeaningError, match=message):
        measure_fidelity(traced("logits"), [X], declared(spec))
