"""The one damage: what it is for each meaning, that it is additive, and that its probes have its Hessian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.damage.given import fidelity


def rand(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_class_damage_is_the_divergence() -> None:
    p, q = 3 * rand(7, 11), 3 * rand(7, 11, seed=6)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()),
        torch.distributions.Categorical(logits=q.double()),
    )
    torch.testing.assert_close(fidelity([p], "logits").damage([q], [p]), expected)


def test_probabilities_do_the_damage_of_their_logits() -> None:
    p, q = rand(7, 11), rand(7, 11, seed=6)
    torch.testing.assert_close(
        fidelity([p], "probabilities").damage([q.softmax(1)], [p.softmax(1)]),
        fidelity([p], "logits").damage([q], [p]),
        rtol=1e-4,
        atol=1e-6,
    )


def test_a_score_does_the_damage_of_its_logit() -> None:
    p, q = 2 * rand(5, 40), 2 * rand(5, 40, seed=6)
    logits = fidelity([p], "sigmoid_logits").damage([q], [p])
    scores = fidelity([p.sigmoid()], "sigmoid").damage([q.sigmoid()], [p.sigmoid()])
    torch.testing.assert_close(logits, scores, rtol=1e-4, atol=1e-7)


def test_a_map_of_classes_is_the_mean_over_its_places() -> None:
    p, q = rand(2, 4, 3, 5), rand(2, 4, 3, 5, seed=6)
    rows = [x.movedim(1, 3).reshape(-1, 4) for x in (p, q)]
    each = fidelity([rows[0]], "logits").damage([rows[1]], [rows[0]])
    torch.testing.assert_close(
        fidelity([p], "logits").damage([q], [p]), each.view(2, -1).mean(1), rtol=1e-6, atol=0
    )


def test_every_output_counts_alike() -> None:
    a, b = rand(6, 4, 5, 3), 640 * rand(6, 2)
    judge = fidelity([a, b])
    assert float(judge.damage([a * 1.1, b * 1.1], [a, b]).mean()) == pytest.approx(0.01, rel=1e-4)
    assert float(judge.damage([a, b * 1.1], [a, b]).mean()) == pytest.approx(0.005, rel=1e-4)


def test_channels_of_unlike_size_are_groups_of_their_own() -> None:
    output = torch.cat([rand(4, 50, 3).sigmoid(), 640 * rand(4, 50, 4)], 2)
    judge = fidelity([output])
    assert [(g.axis, g.channels) for g in judge.groups] == [(2, (0, 1, 2)), (2, (3, 4, 5, 6))]
    worse = output.clone()
    worse[..., :3] *= 1.1
    assert float(judge.damage([worse], [output]).mean()) == pytest.approx(0.005, rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1 / 256])
@pytest.mark.parametrize("offset", [0.0, 128.0])
@pytest.mark.parametrize("shape", [(196,), (98, 2), (2, 98), (14, 7, 2)])
def test_coordinates_have_neither_unit_nor_origin_nor_layout(
    scale: float, offset: float, shape: tuple[int, ...]
) -> None:
    """Landmarks 3 pixels off: the same damage whichever way they are written."""
    marks = 20 * rand(32, 196).double()
    off = marks + 3 * rand(32, 196, seed=6).sign()
    expected = 9 / float(marks.var(0, correction=0).mean())
    right, wrong = ((x * scale + offset * scale).view(32, *shape) for x in (marks, off))
    found = fidelity([right], "coordinates").damage([wrong], [right])
    assert float(found.mean()) == pytest.approx(expected, rel=1e-3)


def test_one_box_and_score_an_image() -> None:
    """A box far off and a score that says nothing are large damages, of one row as of many."""
    box, score = 32 + 8 * rand(64, 4), rand(64, 1, seed=6).sigmoid()
    output = torch.cat([box, score], 1)
    said = {
        "groups": [
            {"kind": "coordinates", "channels": [0, 4]},
            {"kind": "sigmoid", "channels": [4, 5]},
        ]
    }
    judge = fidelity([output], said)
    moved, silent = output.clone(), output.clone()
    moved[:, :4] += 10
    silent[:, 4] = 0
    assert float(judge.damage([moved], [output]).mean()) > 0.5
    assert float(judge.damage([silent], [output]).mean()) == pytest.approx(0.5)


def test_embeddings_are_judged_by_direction() -> None:
    a, b = rand(5, 16), rand(5, 16, seed=6)
    judge = fidelity([a], "embeddings")
    expected = 1 - torch.nn.functional.cosine_similarity(a.double(), b.double())
    torch.testing.assert_close(judge.damage([b], [a]), expected)
    torch.testing.assert_close(judge.damage([7 * b], [a]), expected, rtol=1e-6, atol=1e-9)


def test_a_dead_output_does_no_harm_and_a_broken_one_all() -> None:
    dead, live = torch.zeros(3, 2, 4), rand(3, 5)
    judge = fidelity([dead, live])
    assert judge.damage([dead + 1, live], [dead, live]).tolist() == [0, 0, 0]
    broken = live.clone()
    broken[1, 2] = float("nan")
    assert judge.damage([dead, broken], [dead, live]).isinf().tolist() == [False, True, False]


SAID: list[Any] = [
    "logits",
    "values",
    "coordinates",
    "sigmoid_logits",
    "embeddings",
    {"groups": [{"kind": "logits", "channels": [0, 3]}, {"kind": "values", "channels": [3, 6]}]},
]


@pytest.mark.parametrize("said", SAID, ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 2, 3)], ids=str)
def test_the_damage_of_an_input_does_not_depend_on_those_beside_it(
    said: Any, shape: tuple[int, ...]
) -> None:
    a, b = 3 * rand(48, *shape), 3 * rand(48, *shape, seed=6)
    judge = fidelity([a[:16]], said)
    whole = judge.damage([b], [a])
    single = torch.cat([judge.damage([b[i : i + 1]], [a[i : i + 1]]) for i in range(48)])
    torch.testing.assert_close(whole, single, rtol=1e-12, atol=0)
    assert float(whole.min()) > 0


@pytest.mark.parametrize("said", [*SAID, "probabilities", "sigmoid"], ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 3)], ids=str)
def test_probes_price_a_small_change(said: Any, shape: tuple[int, ...]) -> None:
    """E[(r . change)^2] against the damage itself."""
    a = 2 * rand(3, *shape).double()
    change = 0.01 * rand(3, *shape, seed=6).double()
    b = a + change
    if said in ("probabilities", "sigmoid"):
        a, b = (x.softmax(1) if said == "probabilities" else x.sigmoid() for x in (a, b))
    judge = fidelity(
        [a], {"kind": said, "axis": 1} if isinstance(said, str) else {**said, "axis": 1}
    )
    generator = torch.Generator().manual_seed(1)
    many = a.repeat(8000, *[1] * (a.ndim - 1))
    found = judge.project(
        [(b - a).repeat(8000, *[1] * (a.ndim - 1))], judge.probe([many], generator)
    )
    torch.testing.assert_close(
        found.square().view(8000, 3).mean(0), judge.damage([b], [a]), rtol=0.1, atol=0
    )


def test_probes_of_classes_have_half_the_fisher_matrix_as_their_second_moment() -> None:
    logits = 2 * rand(1, 5)
    judge, generator = fidelity([logits.expand(2, 5)], "logits"), torch.Generator().manual_seed(1)
    draws = judge.probe([logits.expand(20_000, 5)], generator)[0].double()
    p = logits.double().softmax(1)[0]
    torch.testing.assert_close(
        draws.T @ draws / len(draws), (p.diag() - p.outer(p)) / 2, rtol=0, atol=0.01
    )


def test_the_definition_is_its_identity() -> None:
    a = rand(8, 5)
    same, other = fidelity([a], "values"), fidelity([2 * a], "values")
    assert same == fidelity([a], "values")
    assert len({same.digest, other.digest, fidelity([a], "coordinates").digest}) == 3
    with pytest.raises(AttributeError):
        same.groups = ()  # type: ignore[misc]
