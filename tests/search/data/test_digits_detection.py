from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewriter import Plan
from search.config.schema import load_config, shipped_config
from search.data import digits_detection as digits
from search.job import open_job
from search.tasks.detection import coco_ap


def test_scenes_are_the_same_each_time_and_boxes_lie_inside() -> None:
    a, b = digits.scenes(20, 6), digits.scenes(20, 6)
    for i in range(6):
        (x, target), (y, _) = a.evaluation[i], b.evaluation[i]
        assert torch.equal(x, y)
        assert target["boxes"].min() >= 0
        assert target["boxes"].max() <= digits.SIDE
        assert 1 <= len(target["labels"]) <= digits.MAX_DIGITS
    other = digits.scenes(20, 6, seed=5)
    assert not torch.equal(a.evaluation[0][0], other.evaluation[0][0])


def test_what_decoding_returns_for_perfect_outputs_is_perfect() -> None:
    scenes = digits.scenes(2, 12).evaluation
    targets = [scenes[i][1] for i in range(12)]
    outputs = torch.zeros(12, 144, 15)
    for row, target in zip(outputs, targets, strict=True):
        for k, (box, label) in enumerate(zip(target["boxes"], target["labels"], strict=True)):
            row[k, :4], row[k, 4], row[k, 5 + label] = box, 1.0, 1.0
    assert coco_ap(digits.Decode()(outputs), targets)[0] == pytest.approx(1.0)


def test_a_short_training_is_repeatable_and_changes_the_weights() -> None:
    nets = [digits._Detector() for _ in range(2)]
    before = nets[0].head.weight.clone()
    for net in nets:
        digits.train(net, seed=3, epochs=1, count=64)
    assert not torch.equal(nets[0].head.weight, before)
    assert torch.equal(nets[0].head.weight, nets[1].head.weight)


@pytest.mark.slow
def test_splitting_the_head_gives_back_what_int8_took(tmp_path: Path) -> None:
    job = open_job(load_config(shipped_config("detection_digits.yaml")), tmp_path / "run")
    level = job.evaluator.baseline()
    split = job.evaluator.score(Plan.parse("split_head_auto@head"), "whole")
    assert level.float is not None
    assert level.int8 is not None
    assert split.metric is not None
    assert level.float > 0.6
    # intervals paired with float: plain int8 loses for certain, and split heads lose nothing seen
    assert level.interval is not None
    assert split.interval is not None
    assert level.interval[1] < level.float - 0.03
    assert split.interval[0] > level.interval[1]
    assert split.metric > 0.98 * level.float
    assert split.macs == level.macs
    assert split.float_layers == 0
