from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewriter import Plan, PlanError, QuantizeError, profile, rewrite, target, trace
from rewriter.damage import fidelity_of
from rewriter.fitting import thinning
from rewriter.fitting.brain_surgeon import Moments, Problem, Rounding, remove, solve
from rewriter.fitting.fit import fit
from rewriter.fitting.thin_table import thin_table
from rewriter.plan import Step
from tests.rules import check

SHAPE = (3, 14, 12)
SCHEME = target("per_tensor")


def block(channels: int = 16, gate: bool = False) -> nn.Module:
    from tests.rules.test_thin_channels import Gated

    return nn.Sequential(
        nn.Conv2d(6, channels, 1),
        nn.ReLU6(),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.ReLU(),
        Gated(channels) if gate else nn.Identity(),
        nn.Conv2d(channels, 6, 1),
    )


class Network(nn.Module):
    def __init__(self, gate: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.first, self.second = block(gate=gate), block(24)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x.mean((2, 3)))


def batches(count: int = 4, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, *SHAPE, generator=generator) for _ in range(count)]


def graph(gate: bool = False):
    gm = trace(check.randomise(Network(gate)), batches()[0])
    profile(gm, batches())
    return gm


# ------------------------------------------------------------------------ the closed form


def problem(
    x: Tensor, w: Tensor, block: int = 1, roundings: tuple[Rounding, ...] = (), first: int = 0
) -> Problem:
    moments = Moments.empty(x.shape[1], w.shape[1])
    wanted = torch.nn.functional.pad(x, (0, 1), value=1.0) @ w
    moments.add(x, wanted)
    channels = (x.shape[1] - first) // block
    return Problem(moments, w, first, channels, block, torch.ones(w.shape[1]).double(), roundings)


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 3])
def test_the_first_to_go_is_what_a_refit_without_each_says(block: int) -> None:
    x, w = drawn(400, 12) @ drawn(12, 12, 1), drawn(13, 4, 2)
    p = problem(x, w, block)
    (left,) = remove(p, [p.channels - 1]).values()
    errors: list[float] = []
    y = torch.nn.functional.pad(x, (0, 1), value=1.0) @ w
    for q in range(p.channels):
        columns = [i for i in range(12) if i // block != q]
        some = torch.nn.functional.pad(x[:, columns], (0, 1), value=1.0)
        best = torch.linalg.lstsq(some, y).solution
        errors.append(float((some @ best - y).square().sum()))
    gone = set(range(p.channels)) - set(left.tolist())
    assert gone == {min(range(p.channels), key=errors.__getitem__)}


def test_the_refit_is_that_of_lstsq() -> None:
    x, w = drawn(400, 8), drawn(9, 3, 2)
    p = problem(x, w)
    left = remove(p, [5])[5]
    some = torch.nn.functional.pad(x[:, left], (0, 1), value=1.0)
    y = torch.nn.functional.pad(x, (0, 1), value=1.0) @ w
    best = torch.linalg.lstsq(some, y).solution
    torch.testing.assert_close(solve(p, left), best, rtol=1e-3, atol=1e-3)


def test_a_channel_that_is_a_combination_of_others_goes_without_damage() -> None:
    x = drawn(300, 10)
    x[:, 4] = 2 * x[:, 1] - 0.5 * x[:, 7] + 3
    x[:, 8] = x[:, 0] + x[:, 2]
    w = drawn(11, 5, 3)
    p = problem(x, w)
    left = remove(p, [8])[8]
    some = torch.nn.functional.pad(x[:, left], (0, 1), value=1.0)
    y = torch.nn.functional.pad(x, (0, 1), value=1.0) @ w
    error = (some @ solve(p, left) - y).square().sum() / y.square().sum()
    assert float(error) < 1e-8


def test_a_channel_that_alone_sets_the_range_goes_first_where_that_is_best() -> None:
    x, w = drawn(500, 8), drawn(9, 4, 1)
    x[:, 5] *= 300  # an outlier that hardly matters
    w[5] *= 2e-3
    low, high = x.amin(0), x.amax(0)
    alike = torch.ones(8, dtype=torch.float64)
    without = remove(problem(x, w), [7])[7].tolist()
    with_int8 = remove(problem(x, w, roundings=(Rounding(low, high, alike),)), [7])[7].tolist()
    assert 5 in without
    assert 5 not in with_int8
    # where every other channel is as wide, there is nothing to gain
    wide = Rounding(torch.full_like(low, -900.0), torch.full_like(high, 900.0), alike * 1e-6)
    assert remove(problem(x, w, roundings=(wide,)), [7])[7].tolist() == without


def test_channels_beside_others_are_left_alone() -> None:
    x, w = drawn(300, 9), drawn(10, 3, 1)
    x[:, :3] *= 1e-3  # would go first, but is not asked
    p = problem(x, w, first=3)
    assert p.channels == 6
    assert solve(p, remove(p, [2])[2]).shape == (3 + 2 + 1, 3)


# ----------------------------------------------------------------------------- whole plans

PLAN = Plan.parse("thin_channels_50@first_0 thin_channels_62@second_0")


@pytest.mark.parametrize("gate", [False, True])
def test_a_fit_in_order_is_closer_than_without(gate: bool) -> None:
    gm, data = graph(gate), batches()
    fits = fit(gm, PLAN, data, SCHEME)
    assert [r.step for r in fits.reports] == [str(s) for s in PLAN.steps]
    x = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(9))
    found = {
        name: float(fidelity_of(gm, data).damage([new(x)], [gm(x)]).mean())
        for name, new in (
            ("fitted", rewrite(gm, PLAN, fits.weights)),
            ("not fitted", rewrite(gm, PLAN)),
        )
    }
    assert found["fitted"] < found["not fitted"] / 2


def test_later_steps_are_fitted_on_what_earlier_ones_left() -> None:
    gm, data = graph(), batches()
    alone = fit(gm, Plan((Step("thin_channels_62", "second_0"),)), data, SCHEME)
    both = fit(gm, PLAN, data, SCHEME)
    step = "thin_channels_62@second_0"
    assert not torch.equal(
        alone.weights[step]["second_5.weight"], both.weights[step]["second_5.weight"]
    )
    first = str(PLAN.steps[0])
    only = fit(gm, Plan(PLAN.steps[:1]), data, SCHEME)
    for name, value in only.weights[first].items():
        torch.testing.assert_close(value, both.weights[first][name])


def test_plans_that_begin_alike_share_what_they_begin_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, data = graph(), batches()
    fit(gm, Plan(PLAN.steps[:1]), data, SCHEME, tmp_path)
    fitted: list[Step] = []
    run = thinning._Thinned.fit
    monkeypatch.setattr(
        thinning._Thinned, "fit", lambda self, step: (fitted.append(step), run(self, step))[1]
    )
    found = fit(gm, PLAN, data, SCHEME, tmp_path)
    assert fitted == [PLAN.steps[1]]
    expected = fit(gm, PLAN, data, SCHEME)
    for step, state in expected.weights.items():
        for name, value in state.items():
            torch.testing.assert_close(value, found.weights[step][name], rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(thinning._Thinned, "fit", None)
    assert fit(gm, PLAN, data, SCHEME, tmp_path).reports == found.reports


def test_thinning_goes_with_what_replaces_layers_elsewhere() -> None:
    gm, data = graph(), batches()
    plan = Plan.parse("replace_block@first_0 thin_channels_62@second_0")
    fits = fit(gm, plan, data, SCHEME, distilled=False)
    x = batches(1)[0]
    assert rewrite(gm, plan, fits.weights)(x).shape == gm(x).shape


def test_refusals() -> None:
    gm = graph()
    with pytest.raises(QuantizeError, match="no input"):
        fit(gm, PLAN, [], SCHEME)
    with pytest.raises(PlanError, match="both change"):
        rewrite(gm, Plan.parse("thin_channels_38@second_0 thin_channels_62@second_0"))
    with pytest.raises(PlanError, match="no node is called"):
        fit(
            gm, Plan.parse("merge_separable@second_2 thin_channels_38@second_2"), batches(), SCHEME
        )


def test_the_table_ranks_places_as_measuring_them_does(tmp_path: Path) -> None:
    gm, data = graph(), batches(8)
    table = thin_table(gm, data, SCHEME, tmp_path)
    assert thin_table(gm, data, SCHEME, tmp_path) == table
    x = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(9))
    measured: dict[Step, float] = {}
    for step in table:
        plan = Plan((step,))
        new = rewrite(gm, plan, fit(gm, plan, data, SCHEME).weights)
        measured[step] = float(fidelity_of(gm, data).damage([new(x)], [gm(x)]).mean())
        assert table[step].macs > 0
    ranked = sorted(table, key=lambda s: table[s].damage)
    assert measured[ranked[0]] < measured[ranked[-1]]
    by_place = {
        anchor: [s for s in table if s.anchor == anchor] for anchor in {s.anchor for s in table}
    }
    for steps in by_place.values():  # the more goes, the more it costs
        steps.sort(key=lambda s: table[s].macs)
        assert [table[s].damage for s in steps] == sorted(table[s].damage for s in steps)
