from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from search.config.schema import ConfigError
from search.tasks.classification import Classification
from tests.damage.given import fidelity

TASK = Classification()
LOGITS = torch.tensor([[0.1, 2.0, -1.0], [3.0, 0.0, 1.0], [0.0, 0.5, 0.2], [0.0, 1.0, 9.0]])
LABELS = torch.tensor([1, 2, 1, 2])


def damage(reference: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return fidelity([LOGITS], purpose=TASK.purpose).damage([found], [reference])


def test_top1_of_each_sample_and_of_all() -> None:
    assert TASK.per_sample([LOGITS], LABELS).tolist() == [1, 0, 1, 1]
    assert TASK.per_sample([LOGITS], LABELS.tolist()).tolist() == [1, 0, 1, 1]
    assert TASK.score([LOGITS], LABELS) == 0.75
    assert TASK.score([LOGITS], LABELS) == TASK.per_sample([LOGITS], LABELS).mean().item()


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_top1_of_a_resample_counts_repeats(kind: type) -> None:
    assert TASK.score([LOGITS], LABELS, kind([1, 1, 0])) == pytest.approx(1 / 3)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_damage_is_the_kl_divergence_of_scipy(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 7, generator=generator) * scale for _ in range(2))
    wanted = rel_entr(*(softmax(x.double().numpy(), axis=1) for x in (p, q))).sum(1)
    found = damage(p, q)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9)
    assert not np.allclose(damage(q, p).numpy(), wanted)  # which one is the reference


def test_equal_outputs_do_no_damage_whatever_their_offset() -> None:
    assert damage(LOGITS, LOGITS).tolist() == [0, 0, 0, 0]
    shifted = damage(LOGITS, LOGITS + 100)
    assert shifted.min() >= 0
    assert shifted.max() < 1e-9


def test_tiny_damage_is_not_lost_in_rounding() -> None:
    p = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    q = torch.tensor([[1e-6, 0.0]], dtype=torch.float64)
    # 1/8 of the square of the difference, to leading order
    assert damage(p, q).item() == pytest.approx(1.25e-13, rel=1e-2)


def test_outputs_that_are_not_finite_do_infinite_damage() -> None:
    broken = LOGITS.clone()
    broken[1, 0], broken[2, 1] = math.nan, math.inf
    assert damage(LOGITS, broken).isinf().tolist() == [False, True, True, False]


def test_a_class_that_the_reference_rules_out_adds_nothing() -> None:
    p = torch.tensor([[0.0, 1.0, -math.inf]])
    q = torch.tensor([[0.0, 2.0, -math.inf]])
    wanted = damage(p[:, :2], q[:, :2])
    torch.testing.assert_close(damage(p, q), wanted)


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        ([LOGITS], [0, 1, 3, 0], r"outside the network's 3 classes, 0 to 2: 3"),
        ([LOGITS], [0, -1, 2, 0], r"outside the network's 3 classes, 0 to 2: -1"),
        ([LOGITS], [0.0, 1.0, 2.0, 0.0], r"targets must be class indices: torch.float32"),
        ([LOGITS], [0, 1], r"4 outputs for 2 targets"),
        ([LOGITS[0]], [0], r"needs logits \(n, classes\); outputs: \[\(3,\)\]"),
        ([], [0], r"needs logits \(n, classes\); outputs: \[\]"),
    ],
)
def test_outputs_and_targets_that_do_not_fit_are_refused(
    outputs: list[torch.Tensor], labels: list[float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TASK.per_sample(outputs, labels)
