from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rewriter import Plan, cost, profile, target, trace
from rewriter.errors import RewriteError
from rewriter.int8.onnx import ReadBack
from search.config.schema import ConfigError
from search.data.evaluation_set import load_samples
from search.engines import onnxruntime as onnxruntime_engine
from search.run_dir.scores import Records
from search.scoring.added_macs import extra_macs
from search.scoring.evaluator import RewriteEvaluator
from search.tasks.classification import Classification
from tests.search import small


@pytest.fixture(scope="module")
def network() -> Any:
    gm = trace(small.small(), torch.randn(2, 3, 16, 16))
    calibration = [torch.stack([small.data().calibration[i] for i in range(16)])]
    profile(gm, calibration)
    return gm, calibration


def make(network: Any, folder: Path, data: Any = None, **options: Any) -> RewriteEvaluator:
    gm, calibration = network
    samples = options.pop("samples", None) or load_samples((data or small.data()).evaluation)
    settings = {"task": Classification(), "records": Records(folder, "f"), "threads": 1} | options
    return RewriteEvaluator(
        gm=gm, scheme=target("per_tensor"), calibration=calibration, samples=samples, **settings
    )


def test_the_score_of_the_empty_plan_is_the_baseline(network: Any, tmp_path: Path) -> None:
    evaluate = make(network, tmp_path)
    score, base = evaluate(Plan(())), evaluate.baseline()
    x, y = small.data().evaluation.tensors
    with torch.no_grad():
        logits = small.small()(x)
    assert base.float == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert (base.int8, base.damage, base.macs) == (score.metric, score.damage, score.macs)
    assert score.macs_ratio == 1
    assert score.float_layers == 0
    assert score.samples == 48
    assert score.engine == "onnxruntime"
    assert score.interval is not None
    assert score.interval[0] <= score.metric <= score.interval[1]  # type: ignore[operator]


def test_the_engines_agree_and_keeping_the_planted_layer_in_float_repairs_it(
    network: Any, tmp_path: Path
) -> None:
    kernels = make(network, tmp_path / "a")
    simulated = make(network, tmp_path / "b", engine="simulate")
    for text in ("", "keep_float@dw_0", "merge_separable@dw_0"):
        a, b = kernels(Plan.parse(text)), simulated(Plan.parse(text))
        assert a.damage == pytest.approx(b.damage, rel=0.2, abs=2e-3)
        assert (a.macs, a.params, a.weight_bytes) == (b.macs, b.params, b.weight_bytes)
    both = kernels(Plan.parse("keep_float@dw_0 keep_float@pw"))
    assert both.float_layers == 2
    repaired, plain = both.damage, kernels(Plan(())).damage
    assert repaired is not None
    assert plain is not None
    assert repaired < plain / 3


def test_per_sample_values_reproduce_the_score(network: Any, tmp_path: Path) -> None:
    evaluate = make(network, tmp_path)
    score = evaluate(Plan(()))
    samples = evaluate.records.samples("")
    assert samples is not None
    assert samples.metric is not None
    assert samples.damage.mean() == pytest.approx(score.damage)
    assert samples.metric.mean() == pytest.approx(score.metric)


def test_a_plan_is_measured_once_also_by_a_later_process(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(network, tmp_path)(Plan.parse("keep_float@dw_0"))
    monkeypatch.setattr(RewriteEvaluator, "measure", lambda *args: pytest.fail("measured again"))
    assert make(network, tmp_path)(Plan.parse("keep_float@dw_0")) == first


def test_a_rewritten_network_costs_and_measures_what_it_is(network: Any, tmp_path: Path) -> None:
    evaluate = make(network, tmp_path)
    score = evaluate(Plan.parse("merge_separable@dw_0"))
    extra = 8 * 8 * (9 * 8 * 12 - 9 * 8 - 8 * 12)  # 8 x 8 places; one dense 3x3 for both
    assert score.macs - evaluate.baseline().macs == extra
    found = extra_macs(
        network[0],
        [Plan.parse("merge_separable@dw_0"), Plan.parse("keep_float@fc")],
        cost(network[0]).macs,
    )
    assert found == {"merge_separable@dw_0": extra, "keep_float@fc": 0}
    assert score.metric_float is not None


@pytest.mark.parametrize("limit", [10**9, 0])
def test_samples_are_the_same_from_memory_and_read_again(limit: int) -> None:
    samples = load_samples(small.data().evaluation, limit=limit)
    assert (samples.inputs is None) == (limit == 0)
    x, y = small.data().evaluation.tensors
    assert torch.equal(torch.cat(list(samples.batches(7))), x)
    assert torch.equal(samples.targets, y)
    assert samples.digest == load_samples(small.data().evaluation).digest


def test_the_digest_sees_one_changed_pixel_and_one_changed_label() -> None:
    digests = set()
    for change in ("", "pixel", "label"):
        x, y = (t.clone() for t in small.data().evaluation.tensors)
        if change == "pixel":
            x[3, 0, 5, 5] += 1e-6
        if change == "label":
            y[3] = (y[3] + 1) % 5
        digests.add(load_samples(torch.utils.data.TensorDataset(x, y)).digest)
    assert len(digests) == 3


def test_a_candidate_that_raises_is_recorded_and_does_not_end_the_search(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = make(network, tmp_path)
    evaluate.baseline()

    def refuse(*args: object) -> None:
        raise RuntimeError("planted:  no kernel")

    monkeypatch.setattr(onnxruntime_engine, "to_onnx", refuse)
    score = evaluate(Plan.parse("keep_float@dw_0"))
    assert score.error == "RuntimeError: planted: no kernel"
    assert score.metric is None
    assert evaluate.records.get("keep_float@dw_0") == score
    assert score.error_kind == "RuntimeError"
    assert score.traceback is not None
    kept = (tmp_path / score.traceback).read_text()
    assert kept.startswith("plan: keep_float@dw_0\n")
    assert "in refuse" in kept  # where it was raised


def test_a_plan_that_does_not_apply_is_recorded_with_the_reason(
    network: Any, tmp_path: Path
) -> None:
    score = make(network, tmp_path)(Plan.parse("keep_float@nowhere"))
    assert score.error is not None
    assert "no node is called 'nowhere'" in score.error
    assert score.error_kind == "PlanError"


def test_outputs_that_are_not_finite_are_a_failed_candidate(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = make(network, tmp_path)
    evaluate.reference()

    def broken(*args: object) -> Any:
        return lambda x: [torch.full((len(x), 5), torch.nan)], ReadBack(1.0)

    monkeypatch.setattr(RewriteEvaluator, "opened_and_read", broken)
    assert evaluate(Plan.parse("keep_float@fc")).error == (
        "the int8 network's outputs are NaN or infinite"
    )
    with pytest.raises(RewriteError, match="the network as it is cannot be scored"):
        evaluate.baseline()


def test_what_the_users_data_set_raises_is_never_swallowed(network: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sample 7: ZeroDivisionError"):
        load_samples(small.data(broken=True).evaluation)
    data = [small.data().evaluation]

    class Breaking:
        """Whole at first."""

        def __len__(self) -> int:
            return len(data[0])

        def __getitem__(self, index: int) -> Any:
            return data[0][index]

    samples = replace(load_samples(data[0]), dataset=Breaking(), inputs=None)
    evaluate = make(network, tmp_path, samples=samples)
    evaluate.baseline()
    data[0] = small.data(broken=True).evaluation
    with pytest.raises(ConfigError, match="sample 7: ZeroDivisionError"):
        evaluate(Plan.parse("keep_float@fc"))
    assert "keep_float@fc" not in evaluate.records


def test_what_the_users_metric_raises_is_never_swallowed(network: Any, tmp_path: Path) -> None:
    class Metric(Classification):
        calls = 0

        def score(
            self, outputs: Sequence[Tensor], targets: Any, index: Tensor | None = None
        ) -> float:
            self.calls += 1
            if self.calls > 2:
                raise KeyError("in the user's metric")
            return super().score(outputs, targets, index)

    evaluate = make(network, tmp_path, task=Metric())
    evaluate.baseline()
    with pytest.raises(KeyError, match="in the user's metric"):
        evaluate(Plan.parse("keep_float@fc"))
    assert "keep_float@fc" not in evaluate.records


def test_without_labels_there_is_damage_and_no_metric(network: Any, tmp_path: Path) -> None:
    score = make(network, tmp_path, small.data(labels=False))(Plan(()))
    assert (score.metric, score.interval, score.metric_float) == (None, None, None)
    assert score.damage is not None
    assert score.error is None


def test_a_metric_that_is_no_mean_gets_its_interval_from_replicates(
    network: Any, tmp_path: Path
) -> None:
    class Resampled(Classification):
        def per_sample(self, outputs: Any, targets: Any) -> Any:
            return None

        def score(self, outputs: Any, targets: Any, index: Any = None) -> float:
            return float(Classification().per_sample(outputs, targets).mean())

        def matches(self, outputs: Any, targets: Any) -> Any:
            return Classification().per_sample(outputs, targets).numpy()

        def resampled(self, matches: Any, weights: Any) -> Any:
            return weights @ matches / weights.sum(1)

    score = make(network, tmp_path / "a", task=Resampled())(Plan(()))
    plain = make(network, tmp_path / "b")(Plan(()))
    assert score.metric == plain.metric
    assert score.interval == pytest.approx(plain.interval, abs=0.03)
    samples = make(network, tmp_path / "a").records.samples("")
    assert samples is not None
    assert samples.metric is None
    assert samples.replicates is not None
    assert np.shape(samples.replicates) == (500,)


def test_an_evaluator_never_changes_and_others_made_from_it_share_what_is_computed_once(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = make(network, tmp_path)
    with pytest.raises(FrozenInstanceError):
        evaluate.threads = 2  # type: ignore[misc]
    reference, measured = evaluate.reference(), evaluate.measured
    raced = replace(evaluate, limit_s=60.0)
    assert raced.reference() is reference
    assert raced.measured is measured
    assert evaluate.limit_s is None
    # of other samples the outputs are others
    fewer = replace(evaluate, samples=load_samples(small.data(count=20).evaluation))
    assert len(fewer.reference()[0]) == 20
    assert fewer.measured is not measured
    assert len(evaluate.reference()[0]) == 48
