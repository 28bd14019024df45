from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter import Plan, find_sites, profile, quantize, rewrite, target, trace
from rewriter.assemble import prepare
from rewriter.graph.lookup import layers
from rewriter.int8.simulate import Quantized
from rewriter.repair import known_ranges as module
from rewriter.repair.activation_ranges import least_damage_ranges
from rewriter.repair.known_ranges import calibrated, refined
from tests.networks import SIZE
from tests.networks import network as random_network
from tests.rules import check

SHAPE = (3, 9, 10)


@pytest.fixture
def batches() -> tuple[Tensor, ...]:
    return check.inputs(SHAPE, 16).float().split(8)


def network(batches: tuple[Tensor, ...]) -> fx.GraphModule:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.SiLU(), nn.Conv2d(6, 4, 1)
    )
    gm = trace(check.randomise(model), batches[0][:2])
    profile(gm, batches)
    return gm


def never(*args: object) -> Quantized:
    raise AssertionError("measured again")


def test_what_was_seen_of_the_same_network_is_not_measured_again(
    batches: tuple[Tensor, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = target("onnxruntime")
    first = refined(
        calibrated(network(batches), scheme, batches, store=tmp_path), batches, tmp_path
    )
    plain = quantize(network(batches), scheme, batches)
    monkeypatch.setattr(module, "quantize", never)
    monkeypatch.setattr(module, "least_damage_ranges", never)
    again = calibrated(network(batches), scheme, batches, store=tmp_path)
    assert again.calibration.values == plain.calibration.values
    assert again.calibration.samples == plain.calibration.samples
    assert list(again.calibration.stats) == list(plain.calibration.stats)
    for name, scale in plain.calibration.weights.items():
        assert torch.equal(again.calibration.weights[name], scale)
    for name, seen in plain.calibration.stats.items():
        assert torch.equal(again.calibration.stats[name].channel_low, seen.channel_low)
        assert torch.equal(again.calibration.stats[name].channel_high, seen.channel_high)
    again = refined(again, batches, tmp_path)
    assert again.calibration.values == first.calibration.values
    assert again.calibration.values == least_damage_ranges(plain, batches).calibration.values


def test_another_network_other_inputs_or_other_layers_in_float_are_measured(
    batches: tuple[Tensor, ...], tmp_path: Path
) -> None:
    scheme = target("onnxruntime")
    refined(calibrated(network(batches), scheme, batches, store=tmp_path), batches, tmp_path)
    changed, kept = network(batches), network(batches)
    with torch.no_grad():
        changed.get_submodule(str(layers(changed)[1].target)).weight.mul_(1.5)  # type: ignore[operator]
    layers(kept)[1].meta["keep_float"] = True
    for gm, inputs in (
        (changed, batches),
        (kept, batches),
        (network(batches), tuple(2 * x for x in batches)),
    ):
        found = refined(calibrated(gm, scheme, inputs, store=tmp_path), inputs, tmp_path)
        expected = least_damage_ranges(quantize(gm, scheme, inputs), inputs)
        assert found.calibration.values == expected.calibration.values


@pytest.mark.parametrize("seed", range(12))
def test_ranges_that_rules_carried_along_are_those_of_the_network_they_made(seed: int) -> None:
    x = torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(seed))
    gm = trace(random_network(seed), x[:2])
    scheme = target("per_tensor" if seed % 2 else "onnxruntime")
    profile(gm, [x])
    prepare(gm, [x])
    rules = ("equalize", "absorb_bias", "replace_relu6", "refine_ranges")
    sites = [s for s in find_sites(gm) if s.rule in rules and not s.blocked]
    plan = Plan.parse(" ".join(f"{s.rule}@{s.anchor}" for s in sites))
    made = rewrite(gm, plan, facts={"scheme": scheme})
    known = calibrated(made, scheme, [x])
    seen = quantize(made, scheme, [x])
    assert known.calibration.samples == 6
    assert known.calibration.values.keys() == seen.calibration.values.keys()
    for name, (low, high) in seen.calibration.values.items():
        size = max(-low, high)
        assert known.calibration.values[name] == pytest.approx((low, high), abs=1e-4 * size)
    for name, stats in seen.calibration.stats.items():
        mine, size = known.calibration.stats[name], max(-stats.low, stats.high)
        torch.testing.assert_close(
            mine.channel_high, stats.channel_high, rtol=1e-4, atol=1e-4 * size
        )
        torch.testing.assert_close(
            mine.channel_low, stats.channel_low, rtol=1e-4, atol=1e-4 * size
        )


def test_calibration_runs_nothing_where_the_nodes_know_the_ranges_of_these_inputs(
    batches: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = target("onnxruntime")
    gm = network(batches)
    expected = quantize(network(batches), scheme, batches)
    monkeypatch.setattr(module, "quantize", never)
    assert calibrated(gm, scheme, batches).calibration.values == expected.calibration.values
    with pytest.raises(AssertionError, match="measured again"):
        calibrated(gm, scheme, batches[:1])
    profile(gm, batches[:1])  # now the ranges are of both
    with pytest.raises(AssertionError, match="measured again"):
        calibrated(gm, scheme, batches[:1])
    gm = rewrite(
        network(batches),
        Plan.parse(f"keep_float@{layers(network(batches))[2].name}"),
        facts={"scheme": scheme},
    )
    calibrated(gm, scheme, batches)
    weight = layers(gm)[0]
    with torch.no_grad():
        gm.get_submodule(str(weight.target)).weight.mul_(2)  # type: ignore[operator]
    with pytest.raises(AssertionError, match="measured again"):
        calibrated(gm, scheme, batches)
