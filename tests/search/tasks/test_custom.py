from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rewriter import trace
from search.config.schema import ConfigError
from search.tasks.custom import Custom
from tests.damage.given import fidelity
from tests.search.small import small


def top1(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).double().mean())


def made(count: int = 200) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 5, generator=generator)], torch.randint(
        5, (count,), generator=generator
    )


def test_the_metric_sees_outputs_and_targets_of_all_samples_or_of_some() -> None:
    outputs, targets = made()
    task = Custom(top1)
    assert task.metric == "top1" and task.higher_is_better
    assert task.score(outputs, targets) == top1(outputs[0], targets)
    index = [3, 3, 7]
    assert task.score(outputs, targets, index) == top1(outputs[0][index], targets[index])
    same = Custom(lambda o, t: float(sum(int(a.argmax()) == b for a, b in zip(o, t, strict=True))))
    assert same.score(outputs, targets.tolist(), index) == 3 * top1(
        outputs[0][index], targets[index]
    )


def test_outputs_are_nested_as_forward_returns_them() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.net(x)
            return {"logits": y, "twice": 2 * y}

    seen: list[Any] = []
    x = torch.randn(4, 3, 16, 16)
    task = Custom(lambda outputs, targets: seen.append(outputs) or 1.0)
    model = Two().eval()
    task.attach(trace(model, x))
    with torch.no_grad():
        y = model(x)
    task.score([y["logits"], y["twice"]], torch.zeros(4))
    assert seen[0].keys() == {"logits", "twice"} and seen[0]["twice"] is y["twice"]


def test_replicates_of_a_mean_spread_as_its_bootstrap_does() -> None:
    """The groups' jackknife against resampling the samples themselves."""
    outputs, targets = made()
    task = Custom(top1)
    weights = np.random.default_rng(0).multinomial(200, [1 / 200] * 200, 400).astype(np.float64)
    found = task.resampled(task.matches(outputs, targets), weights)
    hits = (outputs[0].argmax(1) == targets).double().numpy()
    exact = weights @ hits / 200
    assert found.std() == pytest.approx(exact.std(), rel=0.3)
    assert found.mean() == pytest.approx(hits.mean(), abs=0.01)
    unweighted = task.resampled(task.matches(outputs, targets), np.ones((2, 200)))
    assert unweighted == pytest.approx(hits.mean())


def test_one_sample_has_no_spread() -> None:
    task = Custom(top1)
    outputs, targets = made(1)
    assert np.ptp(task.resampled(task.matches(outputs, targets), np.ones((3, 1)))) == 0


def test_damage_needs_no_metric_and_is_0_where_nothing_changes() -> None:
    (reference,), _ = made(8)
    judge = fidelity([reference], purpose=Custom(top1).purpose)
    assert float(judge.damage([reference], [reference]).abs().max()) == 0
    assert float(judge.damage([reference + torch.randn(8, 5)], [reference]).min()) > 0


def test_what_the_users_metric_does_wrong_is_said() -> None:
    outputs, targets = made(4)

    def broken(outputs: Any, targets: Any) -> float:
        raise KeyError("no such class")

    with pytest.raises(ConfigError, match=r"metric: KeyError at test_custom.py:\d+"):
        Custom(broken).score(outputs, targets)

    def words(outputs: Any, targets: Any) -> Any:
        return "good"

    with pytest.raises(ConfigError, match="metric: words: must return a number: 'good'"):
        Custom(words).score(outputs, targets)
    with pytest.raises(ConfigError, match="a custom task has no loss"):
        Custom(top1).training_loss(outputs, targets)
