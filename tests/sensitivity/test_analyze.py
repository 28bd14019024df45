from __future__ import annotations

import importlib
import itertools
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewriter import QuantizeError
from rewriter.damage import fidelity_of, kl_divergence
from rewriter.int8.annotate import annotate
from rewriter.int8.scheme import target
from rewriter.int8.simulate import quantize
from rewriter.plan import Plan
from rewriter.sensitivity import Analysis, analyze
from rewriter.sensitivity.exact import Tally, measure
from rewriter.sensitivity.journal import Journal
from rewriter.sensitivity.shared_prefix import Forks, int8_variant, keeping
from rewriter.tracing.trace import trace
from tests.sensitivity.planted import analyzed, healthy, inputs

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["stem", "dw", "pw", "mix", "left", "right", "join", "head"]


def correct(outputs: list[Tensor], targets: Tensor) -> Tensor:
    return outputs[0].argmax(1) == targets


def labels(count: int = 48) -> Tensor:
    return torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(4))


def test_the_json_has_the_form_that_is_promised() -> None:
    found = analyzed(healthy(), targets=labels(), metric=correct, metric_name="top1", top=3)
    content = json.loads(json.dumps(found.to_json()))
    assert content["format"] == 1
    assert (content["target"], content["metric"]) == ("per_tensor", "top1")
    assert (content["higher_is_better"], content["samples"]) == (True, 32)
    assert content["screened_samples"] in range(24, 49)
    assert set(content["baseline"]) >= {"float", "int8", "macs"}
    places = 7 * 6
    by_hand = places * (16 * 27 + 16 * 9 + 24 * 16 + 24 * 24 * 9 + 2 * 12 * 24 + 20 * 24) + 200
    assert content["baseline"]["macs"] == by_hand
    rows = content["layers"]
    assert sorted(r["layer"] for r in rows) == sorted(NAMES)
    for key in (
        "layer",
        "kind",
        "macs",
        "damage",
        "metric",
        "drop",
        "sqnr_db",
        "causes",
        "answers",
    ):
        assert all(key in r for r in rows)
    assert [r["damage"] for r in rows] == sorted((r["damage"] for r in rows), reverse=True)
    assert {r["layer"]: r["kind"] for r in rows}["dw"] == "depthwise"
    for r in rows:
        assert (r["metric"] is None) == (r["drop"] is None) == (not r["exact"])
        if r["exact"]:
            assert 32 <= r["samples"] <= 48
            assert r["interval"][0] <= r["damage"] <= r["interval"][1]
            if r["samples"] == content["samples"]:
                lost = content["baseline"]["float"] - r["metric"]
                assert r["drop"] == pytest.approx(lost)
        assert Plan.parse(" ".join(r["answers"]))
    assert sum(r["exact"] for r in rows) >= 3


def test_metric_and_damage_are_those_of_the_network() -> None:
    model, x, y = healthy(), inputs(), labels()
    found = analyzed(model, targets=y, metric=correct, metric_name="top1", exact=True, race=False)
    with torch.no_grad():
        top1 = float((model(x).argmax(1) == y).double().mean())
    assert found.baseline.float == pytest.approx(top1)
    gm = trace(model, x[:2])
    q = quantize(gm, target("per_tensor"), [inputs(16, 2), inputs(16, 3)])
    forks = Forks(q)
    float_, int8 = forks.run((x,), {}), forks.run((x,), int8_variant(gm))
    expected = float(kl_divergence(int8[0], float_[0]).mean())
    assert found.baseline.damage == pytest.approx(expected, rel=1e-4)
    first = found.interaction[0]
    without = forks.run(
        (x,), keeping(gm, q.scheme, [n for n in gm.graph.nodes if n.name == found.layers[0].node])
    )
    left = float(kl_divergence(without[0], float_[0]).mean())
    assert first.measured
    assert first.gain == pytest.approx(expected - left, rel=1e-3, abs=1e-9)
    assert [p.float_layers for p in found.curve] == [0, 1, 2, 3, 5, 8]
    assert found.curve[1].damage == pytest.approx(left, rel=1e-3)
    # eight layers are all there are: what is left is the rounding at cat and mean
    assert found.curve[-1].damage < 0.1 * expected


def test_predicted_curve_and_interaction_say_so() -> None:
    found = analyzed(healthy(), top=4)
    assert not any(x.measured for x in found.interaction)
    assert [p.measured for p in found.curve] == [True, False, False, False, False]
    assert found.curve[0].damage == found.baseline.damage


def test_screening_and_measuring_everything_agree_on_the_order() -> None:
    broken = healthy()
    broken.dw.weight.data[5] *= 1000
    broken.pw.weight.data[:, 5] /= 1000
    some, everything = analyzed(broken, top=2), analyzed(broken, exact=True)
    assert {x.layer for x in some.layers[:2]} == {x.layer for x in everything.layers[:2]}
    assert all(x.exact for x in everything.layers)


def test_one_seed_gives_one_result() -> None:
    a, b, c = (analyzed(healthy(), top=3, seed=s).to_json() for s in (1, 1, 2))
    assert json.dumps(a) == json.dumps(b)
    assert json.dumps(a) != json.dumps(c)


def test_progress_only_grows_and_ends_at_the_total() -> None:
    seen: list[tuple[float, float]] = []
    analyzed(healthy(), exact=True, progress=lambda done, total: seen.append((done, total)))
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(seen))
    assert all(0 <= done <= total for done, total in seen)
    assert seen[-1][0] == pytest.approx(seen[-1][1], rel=0.15)


def test_harmless_layers_leave_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = healthy()
    broken.dw.weight.data[5] *= 1000
    broken.pw.weight.data[:, 5] /= 1000
    x = inputs(200)
    raced = analyzed(broken, x=x, exact=True, top=2)
    samples = {r.layer: r.samples for r in raced.layers}
    assert samples["dw"] == samples["pw"] == 200
    assert min(samples.values()) < 100
    whole = analyzed(broken, x=x, exact=True, top=2, race=False)
    assert {r.samples for r in whole.layers} == {200}
    for a in raced.layers:
        b = next(r for r in whole.layers if r.layer == a.layer)
        last = whole.layers[1].damage
        near = pytest.approx(b.damage, rel=0.5)
        assert a.damage == near or max(a.damage, b.damage) < 0.01 * last


def test_the_default_race_ends_like_one_without_stops() -> None:
    x = inputs(200)
    raced = analyzed(healthy(), x=x, top=8)
    whole = analyzed(healthy(), x=x, top=8, race=False)
    assert {r.samples for r in whole.layers} == {whole.samples} == {200}
    samples = [r.samples for r in raced.layers]
    assert min(samples) < 100 <= max(samples)  # clear ones leave early, near ones stay
    assert raced.layers[0].layer == whole.layers[0].layer
    assert {r.layer for r in raced.layers[:5]} == {r.layer for r in whole.layers[:5]}
    for a in raced.layers:
        assert a.interval is not None
        b = next(r for r in whole.layers if r.layer == a.layer)
        assert a.interval[0] * 0.7 < b.damage < a.interval[1] * 1.3


def test_a_race_that_stops_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(200)
    module = importlib.import_module("rewriter.sensitivity.analyze")
    monkeypatch.setattr(module, "undecided", lambda *_: set())
    hasty = analyzed(healthy(), x=x, top=8)
    monkeypatch.undo()
    careful = analyzed(healthy(), x=x, top=8)
    assert {r.samples for r in hasty.layers} == {hasty.samples}
    assert max(r.samples for r in careful.layers) > 2 * hasty.samples


def test_sorted_samples_are_seen_evenly() -> None:
    x = torch.cat([0.01 * inputs(100, 5), inputs(100, 6)])  # a prefix tells little of the rest
    early, whole = (analyzed(healthy(), x=x, top=8, race=r) for r in (True, False))
    assert early.samples < 40
    assert early.baseline.damage == pytest.approx(whole.baseline.damage, rel=0.5)
    prefix = analyzed(healthy(), x=x[: early.samples], top=8, race=False)
    assert prefix.baseline.damage != pytest.approx(whole.baseline.damage, rel=0.5)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.sensitivity.planted import analyzed, healthy
steps = 0
def progress(done, total):
    global steps
    steps += 1
    if steps == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
analyzed(healthy(), exact=True, journal=Path(sys.argv[1]), progress=progress)
"""


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 9, 30])
def test_a_killed_analysis_goes_on(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "sensitivity.jsonl"
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(steps)], cwd=ROOT, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    known = len(path.read_text().splitlines()) - 1
    assert known >= min(steps - 1, 20)
    resumed = analyzed(healthy(), exact=True, journal=path)
    assert json.dumps(resumed.to_json()) == json.dumps(analyzed(healthy(), exact=True).to_json())
    lines = path.read_text().splitlines()
    assert len({json.loads(x)["key"] for x in lines[1:]}) == len(lines) - 1


def test_a_finished_journal_measures_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sensitivity.jsonl"
    first = analyzed(healthy(), journal=path, top=3)
    text = path.read_text()
    path.write_text(text + '{"key": "cut sh')

    def refuse(*_: object) -> object:
        raise AssertionError

    module = importlib.import_module("rewriter.sensitivity.analyze")
    monkeypatch.setattr(module, "measure", refuse)
    again = analyzed(healthy(), journal=path, top=3)
    assert json.dumps(again.to_json()) == json.dumps(first.to_json())
    assert path.read_text() == text


@pytest.mark.parametrize("change", ["weights", "inputs", "seed", "target"])
def test_a_journal_of_something_else_is_started_anew(tmp_path: Path, change: str) -> None:
    path = tmp_path / "sensitivity.jsonl"
    analyzed(healthy(), journal=path, top=2)
    header = path.read_text().splitlines()[0]
    model = healthy(1 if change == "weights" else 0)
    x = inputs(48, 9) if change == "inputs" else inputs()
    name = "tensorrt" if change == "target" else "per_tensor"
    found = analyzed(model, name, x, journal=path, top=2, seed=1 if change == "seed" else 0)
    assert path.read_text().splitlines()[0] != header
    fresh = analyzed(model, name, x, top=2, seed=1 if change == "seed" else 0)
    assert json.dumps(found.to_json()) == json.dumps(fresh.to_json())


def test_a_damaged_line_drops_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, "abc") as journal:
        for i in range(4):
            journal.add(str(i), [i, 0.1])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "{broken", lines[4]]) + "\n")
    with Journal(path, "abc") as journal:
        assert journal.found == {"0": [0, 0.1], "1": [1, 0.1]}


def test_a_layer_kept_in_float_is_not_listed() -> None:
    gm = trace(healthy(), inputs(2))
    next(n for n in gm.graph.nodes if n.name == "mix").meta["keep_float"] = True
    found = analyze(gm, target("per_tensor"), [inputs(16, 2)], inputs(), top=2)
    assert sorted(x.layer for x in found.layers) == sorted(n for n in NAMES if n != "mix")


def test_useless_inputs_are_refused() -> None:
    with pytest.raises(QuantizeError, match="evaluation inputs: none"):
        analyze(trace(healthy(), inputs(2)), target("per_tensor"), [inputs(4)], inputs(0))
    gm = trace(nn.Sequential(nn.ReLU(), nn.Flatten()).eval(), inputs(2))
    with pytest.raises(QuantizeError, match="no layer is quantized"):
        analyze(gm, target("per_tensor"), [inputs(4)], inputs(2))


def test_outputs_that_are_values() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.boxes, self.scores = (
                healthy().stem,
                nn.Conv2d(16, 4, 1),
                nn.Conv2d(16, 3, 1),
            )

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.body(x).relu()
            return {"boxes": 640 * self.boxes(y).sigmoid(), "scores": self.scores(y).sigmoid()}

    torch.manual_seed(3)
    found: Analysis = analyzed(Maps().eval(), "onnxruntime", exact=True)
    assert sorted(x.layer for x in found.layers) == ["body", "boxes", "scores"]
    for x in found.layers:
        assert x.sqnr_db == pytest.approx(-10 * math.log10(x.damage))
        assert x.metric is None


def test_measuring_large_outputs_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = trace(healthy(), inputs(2))
    annotate(gm, target("per_tensor"))
    q = quantize(gm, target("per_tensor"), [inputs(16, 2)])
    forks, x = Forks(q), inputs(6)
    fidelity = fidelity_of(gm, [x])
    variants = {"float": {}, "int8": int8_variant(gm)}
    small = dict(measure(forks, fidelity, x, {}, variants))
    monkeypatch.setattr("rewriter.sensitivity.exact.KEPT_OUTPUTS", 0)
    large = dict(measure(forks, fidelity, x, {}, variants))
    assert small == large
    assert max(small["float"]["damage"]) == 0


def test_tally_of_blocks() -> None:
    tally, float_ = Tally(), Tally()
    tally.blocks[4] = {"damage": [3.0], "signal": [1.0], "noise": [0.1], "metric": [0.0]}
    tally.blocks[0] = {
        "damage": [1.0, 2.0],
        "signal": [2.0, 1.0],
        "noise": [0.2, 0.1],
        "metric": [1.0, 0.0],
    }
    float_.blocks[0] = {
        "damage": [0.0, 0.0],
        "signal": [1.0, 1.0],
        "noise": [0.0, 0.0],
        "metric": [1.0, 1.0],
    }
    assert (tally.samples, tally.damage) == (3, 2.0)
    assert tally.noise_ratio == pytest.approx(0.1)
    assert tally.upper(2) == pytest.approx(2 + 2 * (1 / 3) ** 0.5)
    assert tally.drop(float_, True) == pytest.approx(0.5)  # only what both have
    assert tally.drop(float_, False) == pytest.approx(-0.5)


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize(("name", "least"), [("per_tensor", 0.97), ("onnxruntime", 0.97)])
def test_mcunet(assets: Path, monkeypatch: pytest.MonkeyPatch, name: str, least: float) -> None:
    monkeypatch.syspath_prepend(str(assets))
    import zoo  # type: ignore[import-not-found]

    data = zoo.imagenet(176, "half")
    calibration = torch.stack([data.calibration[i] for i in range(64)]).split(16)
    x = torch.stack([data.evaluation[i][0] for i in range(100)])
    found = analyze(
        trace(zoo.mcunet(), x[:2]),
        target(name),
        calibration,
        x,
        exact=True,
        race=False,
        interaction=0,
    )
    exact = [r.damage for r in found.layers]
    screened = [r.screened for r in found.layers]
    assert len(exact) == 55
    assert rank_correlation(exact, screened) >= least
    by_screen = sorted(found.layers, key=lambda r: -r.screened)
    leaders = {r.layer for r in found.layers[:5]}
    assert len({r.layer for r in by_screen[:5]} & leaders) >= 4
    assert leaders <= {r.layer for r in by_screen[:8]}  # so the default analysis measures them
    assert {"stem.0", "blocks.0.dw.0"} <= {r.layer for r in found.layers[:3]}


def rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(v).argsort().argsort().double() for v in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
