"""Runs from Python on a small network with a planted fault: front, resume, export, goal, training, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantfix
from search.cli import main as cli
from tests.search.small import data, small

OPTIONS: dict[str, Any] = {"target": "per_tensor", "device": "cpu", "seed": 0, "progress": False}


class WithBatchNorm(nn.Module):
    """Convolution, depthwise, pointwise, each with a batch norm; the depthwise channels differ by 300."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.dw = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.pw = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12))
        self.fc = nn.Linear(12, 5)
        with torch.no_grad():
            self.dw[0].weight[3] *= 300
            self.pw[0].weight[:, 3] /= 300
            self.fc.weight *= 20

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pw(self.dw(self.stem(x))).mean((2, 3)))


def normalized() -> nn.Module:
    """A network whose batch norms have seen data."""
    torch.manual_seed(0)
    model = WithBatchNorm()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(16, 3, 16, 16))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "run"


@pytest.fixture(scope="module")
def result(folder: Path) -> quantfix.Result:
    splits = data()
    model = small().train()  # as a user has it after training
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = quantfix.optimize(
        model, splits.calibration, splits.evaluation, trials=6, macs=3.0, out=folder, **OPTIONS
    )
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return found


@pytest.mark.slow
def test_the_front_is_that_of_the_run_directory(result: quantfix.Result, folder: Path) -> None:
    stored = json.loads((folder / "front.json").read_text())
    assert [p.plan for p in result.front] == [p["plan"] for p in stored["points"]]
    assert [p.int8 for p in result.front] == [p["int8"] for p in stored["points"]]
    assert result.best().plan == stored["best"]
    assert result.baseline["int8"] == stored["baseline"]["int8"]
    assert result.best().damage < result.baseline["damage"]  # type: ignore[operator]
    assert result.best().engine == result.best().facts["engine"]
    with pytest.raises(AttributeError, match="has no 'colour'"):
        _ = result.best().colour
    assert (folder / "report.html").is_file()
    assert result.sensitivity.layers[0].layer in ("dw.0", "pw")
    assert "points; " in repr(result) and "<svg" in result._repr_html_()
    assert "front" in [trace.name for trace in result.plot().data]


@pytest.mark.slow
def test_points_are_picked_by_name_cost_and_plan(result: quantfix.Result) -> None:
    assert result.pick("best") == result.best()
    assert result.pick("plain").plan == ""
    assert result.pick(result.best().plan) == result.best()
    cheap = result.pick("macs<=1.0")
    assert cheap.macs_ratio <= 1 and cheap in result.front
    for text, message in (
        ("macs<=0.1", "the cheapest plan of the front has"),
        ("macs<=x", "must be macs<=RATIO"),
        ("equalize@nowhere", "not among the"),
    ):
        with pytest.raises(quantfix.RunError, match=message):
            result.pick(text)


@pytest.mark.slow
def test_the_same_call_resumes_and_scores_nothing_again(
    result: quantfix.Result, folder: Path
) -> None:
    lines = (folder / "scores.jsonl").read_text()
    splits = data()
    loader = DataLoader(splits.evaluation, 16, shuffle=True)
    again = quantfix.optimize(
        small(), splits.calibration, loader, trials=6, macs=(1.0, 3.0), out=folder, **OPTIONS
    )
    assert (folder / "scores.jsonl").read_text() == lines
    assert again.front == result.front


@pytest.mark.slow
def test_another_network_is_refused(result: quantfix.Result, folder: Path) -> None:
    splits = data()
    with pytest.raises(quantfix.RunError, match="holds a run of another model"):
        quantfix.optimize(
            small(seed=3), splits.calibration, splits.evaluation, out=folder, **OPTIONS
        )


@pytest.mark.slow
def test_the_written_file_measures_what_the_front_says(
    result: quantfix.Result, tmp_path: Path
) -> None:
    point = result.export(tmp_path / "out")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "out" / "model_int8.onnx"), providers=["CPUExecutionProvider"]
    )
    x, y = data().evaluation.tensors
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.mean(logits.argmax(1) == y.numpy()) == pytest.approx(point.int8)
    assert point.int8 == pytest.approx(result.best().int8, abs=0.05)
    with pytest.raises(quantfix.ConfigError, match="unknown form"):
        result.export(tmp_path, to=("gguf",))


@pytest.mark.slow
def test_commands_read_the_run_but_cannot_have_its_network(
    result: quantfix.Result,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words, code, said in (
        (("front", folder), 0, "plain int8"),
        (("export", folder), 2, "its network was given from Python"),
        (("worker", folder), 2, "its network was given from Python"),
    ):
        monkeypatch.setattr("sys.argv", ["quantfix", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        assert stop.value.code == code
        assert said in " ".join((printed.out + printed.err).split())


@pytest.mark.slow
def test_a_metric_of_ones_own_decides(tmp_path: Path) -> None:
    def hits(outputs: Tensor, targets: Tensor) -> float:
        return float((outputs.argmax(1) == targets).double().mean())

    splits = data()
    given = {"trials": 2, "macs": 3.0, **OPTIONS}
    one = quantfix.optimize(
        small(), splits.calibration, splits.evaluation, metric=hits, out=tmp_path / "a", **given
    )
    two = quantfix.optimize(
        small(), splits.calibration, splits.evaluation, metric="top1", out=tmp_path / "b", **given
    )
    assert one.pick("plain").int8 == two.pick("plain").int8
    assert json.loads((tmp_path / "a" / "front.json").read_text())["metric"] == "hits"
    low, high = one.pick("plain").interval or (0, 0)
    assert low <= one.pick("plain").int8 <= high  # type: ignore[operator]


@pytest.mark.slow
def test_fix_chooses_the_cheapest_that_meets_the_goal(tmp_path: Path) -> None:
    splits = data()
    call = {**OPTIONS, "trials": 6, "max_macs": 1.0, "out": tmp_path / "run"}
    # by name: the network has no labels here
    calibration, x = splits.calibration, splits.evaluation.tensors[0]
    plain = quantfix.analyze(small(), calibration, x, **OPTIONS, out=tmp_path / "run")
    assert plain.baseline.damage is not None
    found = quantfix.fix(small(), calibration, x, max_damage=plain.baseline.damage / 2, **call)
    assert found.met and found.chosen is not None
    assert found.chosen.damage <= plain.baseline.damage / 2  # type: ignore[operator]
    assert found.chosen.macs_ratio <= 1
    missed = quantfix.fix(small(), calibration, x, max_damage=0.0, **call)
    assert missed.met is False and missed.chosen == missed.best()


def test_without_evaluation_and_without_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    x = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    found = quantfix.analyze(small(), x, **OPTIONS)
    assert found.samples == 8
    (own,) = (tmp_path / "runs").iterdir()
    assert own.name.startswith("Small-")
    quantfix.analyze(small(), x, **OPTIONS)
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "per_tenser"}, "target: unknown: 'per_tenser'; did you mean"),
        ({"task": "colour"}, "task: unknown: 'colour'"),
        ({"task": "custom"}, "metric: must be a callable"),
        ({"task": "classification", "metric": "auc"}, "task classification has top1"),
        ({"metric": "f1"}, "metric: .f1.: which task"),
        ({"trials": 0}, "search.trials: should be greater"),
        ({"trails": 3}, "search.trails: unknown key; did you mean"),
        ({"workers": 2}, "one process"),
        ({"macs": (2.0, 1.0)}, "macs: must be"),
        ({"postprocess": len}, "postprocess goes with task .*, not classification"),
        ({"task": "detection"}, "postprocess: must be a callable"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    splits = data()
    options: dict[str, Any] = OPTIONS | {"out": tmp_path} | change
    with pytest.raises(quantfix.ConfigError, match=message):
        quantfix.optimize(small(), splits.calibration, splits.evaluation, **options)
    with pytest.raises(quantfix.ConfigError, match="model: must be an nn"):
        quantfix.optimize("resnet", splits.calibration)  # type: ignore[arg-type]
    with pytest.raises(quantfix.ConfigError, match="how much may be lost"):
        quantfix.fix(small(), splits.calibration)


def test_the_rewritten_network_keeps_its_batch_norms_and_computes_the_same() -> None:
    model = normalized()
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    plain = quantfix.rewrite(model, "", x, keep_batch_norm=True)
    norms = [n for n, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 and all(n.endswith("_bn") for n in norms)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-3, atol=1e-3)
        folded = quantfix.rewrite(model, "", x)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-3)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert all(p.requires_grad for p in plain.parameters())
    # batches of the data that the statistics are of change little in training mode either
    with torch.no_grad():
        plain.train()
        torch.testing.assert_close(plain(x), model(x), rtol=0.05, atol=0.05)
    again = quantfix.rewrite(model, "", x, keep_batch_norm=True)
    assert list(again.state_dict()) == list(plain.state_dict())
    with pytest.raises(quantfix.RewriteError, match="rule 'merge_seperable'"):
        quantfix.rewrite(model, "merge_seperable@dw_0")


@pytest.mark.slow
def test_weights_trained_in_the_users_own_loop_come_back_as_int8(tmp_path: Path) -> None:
    """The best plan's network is trained with batch norm; the int8 file has the trained weights."""
    model = normalized()
    x = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    evaluation = TensorDataset(x[64:], y[64:])
    options = {**OPTIONS, "trials": 8, "macs": 4.0, "out": tmp_path / "run"}
    result = quantfix.optimize(model, x[:64], evaluation, **options)
    plan = result.best().plan
    net = result.rewrite(plan)
    names = list(net.state_dict())
    with torch.no_grad():
        before = net(x[64:])
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    net.train()
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:64]), y[:64]).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        trained = net(x[64:])
    assert not torch.allclose(before, trained, atol=0.1)
    file = tmp_path / "trained.safetensors"
    safetensors.torch.save_file(net.state_dict(), str(file))
    result.export(tmp_path / "out", plan, weights=file)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "out" / "model_int8.onnx"), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {session.get_inputs()[0].name: x[64:].numpy()})
    error = float((torch.from_numpy(found) - trained).square().mean() / trained.square().mean())
    other = float((torch.from_numpy(found) - before).square().mean() / trained.square().mean())
    assert error < 0.2 * other
    assert names == list(result.rewrite(plan).state_dict())
    with pytest.raises(quantfix.RewriteError, match="weights: of another network or plan"):
        result.export(tmp_path / "other", plan, weights={"a.weight": torch.ones(1)})
    broken = {
        k: v * torch.nan if v.is_floating_point() else v for k, v in net.state_dict().items()
    }
    with pytest.raises(quantfix.RewriteError, match="NaN or infinite"):
        result.export(tmp_path / "other", plan, weights=broken)
    with pytest.raises(quantfix.ConfigError, match="not readable as safetensors"):
        result.export(tmp_path / "other", plan, weights=tmp_path / "none.safetensors")
