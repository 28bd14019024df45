"""A projection is the random direction times the change that one part makes at the outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.damage import Fidelity, declared, measure_fidelity
from rewriter.graph.lookup import layers, module_of, outputs
from rewriter.int8.integer_grid import round_to_int8
from rewriter.int8.scheme import target
from rewriter.int8.simulate import Quantized, quantize
from rewriter.sensitivity.screen import Candidate, Screener, Screening
from rewriter.sensitivity.shared_prefix import Forks, State, int8_variant, only, rounded_weight
from rewriter.tracing.trace import trace
from tests.networks import randomise


class Linear(nn.Module):
    """Only affine layers: the first order is the whole truth, whatever the size of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.b = nn.Conv2d(8, 8, (3, 1), groups=8, padding=(1, 0))
        self.c = nn.Conv2d(8, 6, 1, bias=False)
        self.d = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = torch.cat([self.c(self.b(y)), self.d(y)], 1)
        return self.fc(z.mean((2, 3)))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.dw = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.pw = nn.Conv2d(12, 12, 1)
        self.act = nn.ReLU6()
        self.fc = nn.Linear(12, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = x + self.pw(self.act(self.dw(x)))
        return self.fc(x.mean((2, 3)))


def setup(
    make: type[nn.Module], kind: str | list[str], name: str = "per_tensor"
) -> tuple[Quantized, Fidelity, Tensor]:
    torch.manual_seed(1)
    model = randomise(make(), 1)
    x = torch.randn(10, 3, 13, 11, generator=torch.Generator().manual_seed(2))
    gm = trace(model, x[:2])
    kinds = [kind] * len(outputs(gm)) if isinstance(kind, str) else kind
    fidelity = measure_fidelity(gm, [x], declared(kinds))
    return quantize(gm, target(name), [x]), fidelity, x


@pytest.mark.parametrize("kind", ["logits", "values"])
def test_projections_of_a_linear_network_are_exact(kind: str) -> None:
    q, fidelity, x = setup(Linear, kind)
    for node in layers(q.gm):  # alone, a weight reads floats, and its bias is then not rounded
        bias = module_of(q.gm, node).bias
        if bias is not None:
            nn.init.zeros_(bias)
    q.gm.double()
    x = x.double()
    forks = Forks(q)
    screener = Screener(q, fidelity, directions=1)
    reference = forks.run((x,), {})
    r = fidelity.probe(reference, torch.Generator().manual_seed(9))
    rows = screener.batch(x, torch.Generator().manual_seed(9))
    variants = {("weights", n.name): {n.name: State(weight=True)} for n in layers(q.gm)}
    for reader, values in screener.parts.rounded.items():
        for v in values:
            variants["edges", f"{reader} {v}"] = {reader: State(reads=frozenset([v]))}
    assert len(variants) > 10
    for (part, name), variant in variants.items():
        change = [a - b for a, b in zip(forks.run((x,), variant), reference, strict=True)]
        expected = fidelity.project(change, r)
        found = torch.tensor(rows[part][name], dtype=torch.float64)[:, 0]
        scale = max(float(expected.abs().max()), 1e-7)
        torch.testing.assert_close(
            found, expected, rtol=0, atol=1e-6 * scale, msg=f"{part} {name}"
        )


def screened(q: Quantized, fidelity: Fidelity, x: Tensor, directions: int = 150) -> Screening:
    screener = Screener(q, fidelity, directions=directions)
    screening = Screening(screener.parts)
    for i, part in enumerate(x.split(5)):
        screening.extend(screener.batch(part, torch.Generator().manual_seed(i)))
    return screening


@pytest.mark.parametrize("name", ["onnxruntime", "per_tensor"])
@pytest.mark.parametrize("kind", ["logits", "values"])
def test_screened_damage_comes_near_the_measured(kind: str, name: str) -> None:
    q, fidelity, x = setup(Small, kind, name)
    screening = screened(q, fidelity, x)
    forks = Forks(q)
    reference = forks.run((x,), {})
    for node in layers(q.gm):
        found = forks.run((x,), only(screening.parts, node))
        exact = float(fidelity.damage(found, reference).mean())
        # what a head adds before its result is rounded is not independent of that rounding
        tolerance = 0.8 if screening.parts.returned[node.name] else 0.3
        assert screening.layer_damage()[node.name] == pytest.approx(exact, rel=tolerance)
    whole = float(fidelity.damage(forks.run((x,), int8_variant(q.gm)), reference).mean())
    assert screening.predict() == pytest.approx(whole, rel=0.9)
    assert screening.predict([n.name for n in layers(q.gm)]) < 0.5 * screening.predict()


@pytest.mark.slow
def test_value_damage_is_that_of_rounding_one_value_for_all_its_readers() -> None:
    q, fidelity, x = setup(Small, "values")
    screening = screened(q, fidelity, x)
    forks = Forks(q)
    reference = forks.run((x,), {})
    for name, edges in screening.parts.values.items():
        variant: dict[str, State] = {}
        for reader, value in edges:
            known = variant.get(reader, State())
            variant[reader] = State(reads=known.reads | {value})
        exact = float(fidelity.damage(forks.run((x,), variant), reference).mean())
        assert screening.value_damage()[name] == pytest.approx(exact, rel=0.5), name


def test_a_candidate_is_priced_by_its_own_local_error() -> None:
    q, fidelity, x = setup(Small, "values")
    node = next(n for n in layers(q.gm) if n.name == "dw")
    layer = module_of(q.gm, node)
    source: Any = node.args[0]
    same = copy.deepcopy(layer)
    same.weight = nn.Parameter(rounded_weight(q, node), requires_grad=False)
    spec = q.value_params(source), source.meta["int8"].output

    def as_it_is(v: Tensor) -> Tensor:
        return same(round_to_int8(v, *spec[0], spec[1]))

    candidates = [
        Candidate("float", source.name, "dw", layer, ("dw",)),
        Candidate("as it is", source.name, "dw", as_it_is, ("dw",)),
    ]
    screener = Screener(q, fidelity, candidates, directions=30)
    screening = Screening(screener.parts)
    screening.extend(screener.batch(x, torch.Generator().manual_seed(0)))
    assert screening.candidate_damage()["float"] == 0
    alone = screening.layer_damage()["dw"]
    assert screening.candidate_damage()["as it is"] == pytest.approx(alone, rel=0.1)
    kept = screening.predict() - screening.predict(["dw"])
    assert screening.price(candidates[0]) == pytest.approx(kept)
    assert abs(screening.price(candidates[1])) < 0.2 * abs(kept)


def test_several_directions_are_several_estimates() -> None:
    q, fidelity, x = setup(Small, "logits")
    screener = Screener(q, fidelity, directions=3)
    rows = screener.batch(x, torch.Generator().manual_seed(0))
    p = torch.tensor(rows["weights"]["stem"])
    assert p.shape == (10, 3)
    assert not torch.allclose(p[:, 0], p[:, 1])


class Unused(nn.Module):
    """A head that is computed in integers: no gradient passes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(4, 5, 1)
        self.c = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.b(y), self.c(y).argmax(1)


def test_an_output_without_gradient_is_left_out() -> None:
    q, fidelity, x = setup(Unused, ["values", "values"])
    screening = screened(q, fidelity, x, 2)
    assert screening.layer_damage()["c"] == 0
    assert screening.layer_damage()["b"] > 0


class Coded(nn.Module):
    """A layer that reads constants alone, as codes of positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.coder = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(2, 6, 1)
        self.fc = nn.Linear(6, 5)
        places = torch.linspace(-1, 1, 2 * 9 * 9).view(1, 2, 9, 9)
        self.register_buffer("places", places.sin())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x) + self.coder(self.places))
        return self.fc(y.mean((2, 3)))


def test_a_layer_of_constants_is_a_constant_itself() -> None:
    model = randomise(Coded(), 1)
    x = torch.randn(4, 3, 9, 9)
    gm = trace(model, x[:2])
    assert [n.name for n in layers(gm)] == ["a", "fc"]
    torch.testing.assert_close(gm(x), model(x))
