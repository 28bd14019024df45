from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rewriter import Plan, profile, trace
from rewriter.graph.lookup import layers
from rewriter.plan import rewrite
from rewriter.rules.replace_relu6 import ReplaceRelu6
from search.pareto.limits import Limits, float_islands, size_of
from search.run_dir.scores import Score
from tests.search.cli.test_main import load, quantfix, write_config


@pytest.fixture(scope="module")
def chain() -> Any:
    """Five convolutions in a row, and a shortcut from the first to the last."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.ModuleList(nn.Conv2d(4, 4, 3, 1, 1) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.c[0](x).relu()
            b = self.c[2](self.c[1](a).relu()).relu()
            return self.c[4](self.c[3](b).relu() + a)

    torch.manual_seed(0)
    gm = trace(Net().eval(), torch.randn(2, 4, 8, 8))
    profile(gm, [torch.randn(4, 4, 8, 8)])
    return gm


@pytest.mark.parametrize(
    ("kept", "islands"),
    [([], 0), ([1], 1), ([1, 2], 1), ([1, 3], 2), ([0, 4], 1), ([0, 2, 4], 2), (range(5), 1)],
)
def test_islands_are_float_layers_with_no_int8_layer_between(
    chain: Any, kept: list[int], islands: int
) -> None:
    plan = Plan.parse(" ".join(f"keep_float@c_{i}" for i in kept))
    gm = rewrite(chain, plan)
    assert float_islands(gm) == islands
    assert size_of(plan, gm).float_layers == len(kept)


def test_each_limit_is_a_bound_of_its_own() -> None:
    score = Score(plan="a@b", macs=10, params=10, weight_bytes=10, float_layers=10,
                  float_islands=10, latency_ms=10, latency_ratio=10)  # fmt: skip
    for name in Limits().to_dict():
        assert Limits.of({name: 10}).meets(score)
        assert not Limits.of({name: 9}).meets(score)
        assert Limits.of({name: 9}).excess(score) == {f"max_{name}": 1}
    assert Limits(latency_ms=1).meets(Score(plan="", macs=1))
    assert Limits.of({"macs": 5, "of_a_later_version": 1}) == Limits(macs=5)


def test_a_plan_that_cannot_meet_the_limits_is_known_before_it_is_run(chain: Any) -> None:
    admits = Limits(float_islands=1).admits(chain)
    assert admits(Plan.parse("keep_float@c_1 keep_float@c_2"))
    assert not admits(Plan.parse("keep_float@c_1 keep_float@c_3"))
    params = 5 * (4 * 4 * 9 + 4)
    kept = Plan.parse("keep_float@c_1")
    least = 5 * 144 + 4 * 5 * 4
    assert Limits(params=params, weight_bytes=least + 3 * 144).admits(chain)(kept)
    assert not Limits(weight_bytes=least + 3 * 144 - 1).admits(chain)(kept)
    assert not Limits(params=params - 1).admits(chain)(kept)
    assert Limits(macs=0).admits(chain)(kept)  # the space sees to that
    assert not Limits(float_layers=0).admits(chain)(kept)


def test_a_plan_that_cannot_be_carried_out_is_known_before_it_is_run(chain: Any) -> None:
    assert not Limits().admits(chain)(Plan.parse("keep_float@nowhere"))
    assert Limits().admits(chain)(Plan())
    assert not Limits().admits(chain)(Plan.parse("absorb_bias@model"))  # the layers pad


def test_a_rule_for_the_whole_model_counts_with_what_it_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1)).eval()
    gm = trace(chain, torch.randn(2, 3, 8, 8))
    profile(gm, [torch.randn(4, 3, 8, 8)])
    last = list(layers(gm))[-1]

    def grow(self: ReplaceRelu6, made: Any, site: Any) -> None:
        del self, site
        made.set_submodule(str(last.target), nn.Conv2d(8, 4, 3, padding=1).eval())

    monkeypatch.setattr(ReplaceRelu6, "apply", grow)
    admits = Limits(params=sum(p.numel() for p in chain.parameters())).admits(gm)
    assert admits(Plan())
    assert not admits(Plan.parse("replace_relu6@model"))


def test_the_parts_of_a_layer_in_float_count_once() -> None:
    chain: Any = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 1))
    nn.init.uniform_(chain[0].weight, -0.01, 0.01)
    nn.init.uniform_(chain[0].weight[:2].data, 5, 9)
    gm = trace(chain.eval(), torch.randn(2, 3, 8, 8))
    profile(gm, [torch.randn(4, 3, 8, 8)])
    first = next(n.name for n in layers(gm))
    plan = Plan.parse(f"split_weights_2@{first} keep_float@{first}")
    made = rewrite(gm, plan)
    assert sum(bool(n.meta.get("keep_float")) for n in layers(made)) == 2
    assert size_of(plan, made).float_layers == 1


LIMITED = {"trials": 14, "max_macs": 3.0, "max_float_layers": 4}


@pytest.mark.parametrize(
    ("limit", "key"),
    [
        ({"max_float_islands": 1}, "float_islands"),
        pytest.param({"max_params": 1.0}, "params", marks=pytest.mark.slow),
        pytest.param({"max_weight_bytes": 600}, "weight_bytes", marks=pytest.mark.slow),
    ],
)
def test_a_run_proposes_and_shows_only_what_meets_its_limits(
    limit: dict[str, Any], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, search=LIMITED | limit)
    out = tmp_path / "out"
    assert quantfix(monkeypatch, "run", config, "--out", out, "-q") == 0
    bound = load(out / "run.json")["limits"][key]
    front = load(out / "front.json")
    points = front["points"] + front["ties"]
    assert points
    assert all(p[key] <= bound for p in points if p["plan"])
    scores = [json.loads(x)["score"] for x in (out / "scores.jsonl").read_text().splitlines()]
    references = {p["plan"] for p in front["references"]}
    over = [s for s in scores if s[key] > bound and s["plan"] not in references]
    # the ladder and what is predicted to be best are scored whatever they weigh
    assert len(over) < len(scores) / 2


@pytest.mark.parametrize(("longest", "code"), [(1e-6, 1), (1e6, 0)])
def test_fix_holds_a_limit_on_measured_time(
    longest: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"trials": 3, "max_latency_ms": longest, "max_drop": 100}
    config = write_config(tmp_path, search=limits)
    out = tmp_path / "out"
    assert quantfix(monkeypatch, "fix", config, "--out", out, "-q") == code
    assert (out / "fixed" / "model_int8.onnx").exists()
    front = load(out / "front.json")
    assert all(p["latency_ms"] > 0 for p in front["points"])


@pytest.mark.slow
def test_the_front_may_stand_against_time_instead_of_macs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, search={"trials": 8, "max_macs": 3, "cost": "latency"})
    out = tmp_path / "out"
    assert quantfix(monkeypatch, "run", config, "--out", out, "-q") == 0
    front = load(out / "front.json")
    times = [p["predicted_ms"] for p in front["points"]]
    assert all(p["latency_ms"] > 0 for p in front["points"])
    assert front["cost"] == "latency"
    assert times == sorted(times)
    quality = [p["int8"] for p in front["points"]]
    assert quality == sorted(quality)


@pytest.mark.parametrize(("most", "code"), [(0.0, 1), (1e9, 0)])
def test_without_labels_fix_goes_by_the_damage(
    most: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"trials": 6, "max_damage": most}
    data = {"factory": "small:data", "args": {"labels": False}}
    config = write_config(tmp_path, data=data, search=search)
    out = tmp_path / "out"
    assert quantfix(monkeypatch, "fix", config, "--out", out, "-q") == code
    front = load(out / "front.json")
    assert front["objective"] == "damage"
    damages = [p["damage"] for p in front["points"]]
    assert damages == sorted(damages, reverse=True)
    assert (out / "fixed" / "model_int8.onnx").exists()
