from __future__ import annotations

import pytest
import torch

from rewriter.sensitivity.objective import Objective

GENERATOR = torch.Generator().manual_seed(5)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def test_class_damage_is_the_divergence() -> None:
    p, q = 3 * rand(7, 11), 3 * rand(7, 11)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()),
        torch.distributions.Categorical(logits=q.double()),
    )
    torch.testing.assert_close(Objective.of([p]).damage([p], [q]), expected)


def test_probabilities_are_recognised_and_give_the_same_damage() -> None:
    p, q = rand(7, 11), rand(7, 11)
    objective = Objective.of([p.softmax(1)])
    assert objective.probabilities
    assert not Objective.of([p]).probabilities
    torch.testing.assert_close(
        objective.damage([p.softmax(1)], [q.softmax(1)]),
        Objective.of([p]).damage([p], [q]),
        rtol=1e-4,
        atol=1e-6,
    )


def test_value_damage_weighs_each_output_alike() -> None:
    a, b = rand(6, 4, 5, 3), 640 * rand(6, 2)
    objective = Objective.of([a, b])
    damage = objective.damage([a, b], [a * 1.1, b * 1.1])
    torch.testing.assert_close(
        damage.mean(), torch.tensor(0.01, dtype=torch.float64), rtol=1e-4, atol=0
    )
    only_b = objective.damage([a, b], [a, b * 1.1]).mean()
    torch.testing.assert_close(only_b, torch.tensor(0.005, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("axis", [1, 2])
def test_channels_of_unlike_size_are_groups_of_their_own(axis: int) -> None:
    scores, boxes = (
        torch.rand(4, 3, 50, generator=GENERATOR),
        640 * torch.rand(4, 4, 50, generator=GENERATOR),
    )
    output = torch.cat([scores, boxes], 1)
    output = output if axis == 1 else output.transpose(1, 2)
    objective = Objective.of([output])
    assert objective.groups[0][0] == axis
    assert objective.groups[0][1].tolist() == [0] * 3 + [1] * 4
    worse = output.clone()
    worse.narrow(axis, 0, 3).mul_(1.1)
    found = objective.damage([output], [worse]).mean()
    torch.testing.assert_close(found, torch.tensor(0.005, dtype=torch.float64), rtol=1e-4, atol=0)


def test_probes_have_half_the_fisher_matrix_as_their_second_moment() -> None:
    logits = 2 * rand(1, 5)
    objective = Objective.of([logits.expand(2, 5)])
    draws = torch.cat([objective.probe([logits], GENERATOR)[0] for _ in range(20_000)]).double()
    p = logits.double().softmax(1)[0]
    torch.testing.assert_close(
        draws.T @ draws / len(draws), (p.diag() - p.outer(p)) / 2, rtol=0, atol=0.01
    )


def test_probes_of_values_reproduce_the_damage() -> None:
    outputs = [rand(4, 3, 5), 100 * rand(4, 6)]
    changed = [o + 0.1 * rand(*o.shape) for o in outputs]
    objective = Objective.of(outputs, "values")
    expected = objective.damage(outputs, changed)
    total = torch.zeros(4, dtype=torch.float64)
    for _ in range(3000):
        r = objective.probe(outputs, GENERATOR)
        change = [c - o for c, o in zip(changed, outputs, strict=True)]
        total += objective.project(outputs, change, r) ** 2
    torch.testing.assert_close(total / 3000, expected, rtol=0.12, atol=0)


def test_small_changes_of_classes_cost_what_the_projections_say() -> None:
    logits = 2 * rand(3, 8)
    change = 0.02 * rand(3, 8)
    objective = Objective.of([logits])
    r = [objective.probe([logits], GENERATOR) for _ in range(20_000)]
    found = sum(objective.project([logits], [change], x) ** 2 for x in r) / len(r)
    torch.testing.assert_close(
        found, objective.damage([logits], [logits + change]), rtol=0.05, atol=0
    )


def test_a_dead_output_does_no_harm() -> None:
    dead, live = torch.zeros(3, 2, 4), rand(3, 5)
    objective = Objective.of([dead, live])
    damage = objective.damage([dead, live], [dead + 1, live])
    assert torch.equal(damage, torch.zeros(3, dtype=torch.float64))
