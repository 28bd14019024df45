"""Which splits are tried first, and that the ladder climbs them before all else."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from rewriter import Plan, find_sites, rewrite, target
from rewriter.damage import fidelity_of
from rewriter.graph.interpret import walk
from rewriter.graph.lookup import layers, outputs
from rewriter.int8.onnx.export import to_onnx
from rewriter.int8.onnx.session import Session
from rewriter.int8.simulate import quantize
from rewriter.ladder import Rung, best, climb, exact_splits
from rewriter.rules import Site
from rewriter.sensitivity.remedies import find_answers
from tests.detectors import Yolov8, Yolox, trained
from tests.rules import check
from tests.rules.test_scale_norm import outlier
from tests.test_detectors import graph_of
from tests.test_ladder import Score


def splits_of(gm: fx.GraphModule, harmful: str | None) -> dict[str, list[str]]:
    hurt = {n.name: float(n.name == harmful) for n in layers(gm)}
    found = exact_splits(gm, find_sites(gm), hurt)
    return {name: [str(s) for s in steps] for name, steps in found}


@pytest.mark.parametrize("make", [Yolox, Yolov8])
def test_all_heads_the_tail_and_the_value_that_harms_its_reader(make) -> None:
    gm, _ = graph_of(trained(make(n=0)))
    stem, reader = (n.name for n in layers(gm)[:2])
    found = splits_of(gm, reader)
    heads = [s for s in find_sites(gm) if s.rule == "split_head_auto" and not s.blocked]
    assert len(heads) == 6
    assert sorted(found["outputs split"]) == sorted(
        ["float_tail@output", *(f"split_head_auto@{h.anchor}" for h in heads)]
    )
    assert found["channels split by range"] == [f"split_range_3@{stem}"]
    assert "channels split by range" not in splits_of(gm, None)


def test_the_split_of_a_value_answers_the_layer_that_reads_it() -> None:
    gm, x = graph_of(trained(Yolox(n=0)))
    stem, reader = layers(gm)[:2]
    found = find_answers(quantize(gm, target("onnxruntime"), [x]), [reader])
    assert f"split_range_3@{stem.name}" in dict(found[reader.name])


def test_a_classifier_has_no_outputs_to_split() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 9))
    gm = check.graph_of(check.randomise(net), (3, 9, 8))
    assert "outputs split" not in splits_of(gm, None)


def test_the_activations_before_and_behind_what_is_hurt_are_replaced() -> None:
    layers_of = [m for _ in range(7) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.SiLU())]
    gm = check.graph_of(check.randomise(nn.Sequential(*layers_of, nn.Conv2d(4, 2, 1))), (4, 9, 8))
    found = splits_of(gm, "_4")["activations replaced"]
    assert found == ["replace_activation_relu@_2", "replace_activation_relu@_4"]
    hurt = dict.fromkeys((n.name for n in layers(gm)), 1.0)
    steps = dict(exact_splits(gm, find_sites(gm), hurt))["activations replaced"]
    assert len(steps) == 5
    assert "activations replaced" not in splits_of(gm, None)


def test_every_layer_norm_that_spreads_is_scaled_and_every_trunk_summed_in_float() -> None:
    gm = check.graph_of(outlier(Spread()), (5, 8), "onnxruntime")
    found = splits_of(gm, None)
    assert found["layer norms scaled"] == ["scale_norm@norms_0", "scale_norm@norms_1"]
    assert found["residual trunks in float"] == ["float_trunk@add"]


class Spread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = x + part(norm(x))
        return x


def scored(plan: Plan, left: dict[str, float]) -> Score:
    found = 1.0
    for step in plan.steps:
        found *= left.get(step.rule, 1.0)
    return Score(found)


@pytest.mark.parametrize(("left", "kept"), [(0.5, True), (0.9, False)])
def test_a_split_that_gains_little_is_not_kept(left: float, kept: bool) -> None:
    gm, _ = graph_of(trained(Yolox(n=0)))
    splits = exact_splits(gm, find_sites(gm), {})
    asked: list[str] = []

    def score(plan: Plan) -> Score:
        asked.append(str(plan))
        return scored(plan, {"float_tail": left, "correct_bias": 0.5})

    rungs = climb(gm, score, splits=splits)
    assert [r.name for r in rungs[:2]] == ["plain int8", "outputs split"]
    assert asked[1] == str(Plan(splits[0][1]))
    assert rungs[1].kept == kept
    assert ("float_tail" in str(best(rungs).plan)) == kept
    assert "correct_bias" in str(best(rungs).plan)


def test_a_split_that_shows_nothing_alone_is_tried_with_the_next() -> None:
    gm, _ = graph_of(trained(Yolox(n=0)))
    splits = exact_splits(gm, find_sites(gm), {layers(gm)[1].name: 1.0})

    def score(plan: Plan) -> Score:
        rules = {s.rule for s in plan.steps}
        return Score(0.1 if {"float_tail", "split_range_3"} <= rules else 1.0)

    rungs = climb(gm, score, splits=splits)
    assert [r.kept for r in rungs[:3]] == [True, False, True]
    assert best(rungs).plan == Plan((*splits[0][1], *splits[1][1]))


@pytest.mark.slow
def test_the_first_rungs_bring_a_collapsed_detector_back() -> None:
    """Plain int8 is useless, and two trials later nearly all is back, in ONNX Runtime."""
    gm, x = graph_of(trained(Yolox(n=0)))
    found = dict(walk(gm, (x,)))
    reference = [found[n] for n in outputs(gm)]

    def score(plan: Plan) -> Score:
        quantized = quantize(rewrite(gm, plan), target("onnxruntime"), [x])
        made = [torch.from_numpy(o) for o in Session(to_onnx(quantized)).run(x)]
        return Score(float(fidelity_of(gm, [x]).damage(made, reference).mean()))

    reader = layers(gm)[1].name
    rungs: tuple[Rung, ...] = climb(
        gm, score, splits=exact_splits(gm, find_sites(gm), {reader: 1})
    )
    assert rungs[0].damage > 0.05  # relative squared error, mean over the groups of the outputs
    assert rungs[2].kept
    assert rungs[2].damage < 0.1 * rungs[0].damage


def chosen_by_range(hurt: list[float]) -> list[str]:
    """Of places that hurt their readers by so much each, those that are split first."""
    sites = [Site("split_range_3", (f"made{i}", f"read{i}")) for i in range(len(hurt))]
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    damages = {f"read{i}": value for i, value in enumerate(hurt)}
    found = exact_splits(fx.GraphModule(nn.Module(), graph), sites, damages)
    return [step.anchor for _, steps in found for step in steps]


def test_only_the_four_worst_places_are_split_first() -> None:
    """Each split adds kernel calls; the search may still add others."""
    assert chosen_by_range([0.1, 0.2, 0.3, 0.15, 0.25, 0.12]) == [
        "made2",
        "made4",
        "made1",
        "made3",
    ]


@pytest.mark.parametrize(("share", "split"), [(0.08, False), (0.12, True)])
def test_a_place_with_less_than_a_tenth_of_the_damage_is_not_split_first(
    share: float, split: bool
) -> None:
    found = chosen_by_range([1 - share, share])
    assert found == (["made0", "made1"] if split else ["made0"])
