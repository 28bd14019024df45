from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewriter import Plan, QuantizeError, profile, rewrite, target, trace
from rewriter.assemble import assemble
from rewriter.fitting.fit import FitReport, fit
from rewriter.fitting.least_squares import NormalEquations, unfold
from rewriter.storage.cache import load, save_to
from rewriter.storage.digest import data_digest, graph_digest
from tests.rules import check

SHAPE = (3, 20, 18)
PLAN = Plan.parse("merge_separable@_2")
SCHEME = target("onnxruntime")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.fitting.distill.SEEN", 320)


def network() -> nn.Module:
    return check.randomise(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, 2),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6),
            nn.ReLU6(),
            nn.Conv2d(6, 8, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    )


def batches(count: int = 4, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, *SHAPE, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (1, 3), stride=2, dilation=(1, 2), padding=(0, 3)),
        nn.Conv2d(4, 6, 3, groups=2, padding="same"),
        nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, (2, 4), padding="same", padding_mode="circular"),
    ],
)
def test_unfolding_gives_what_the_convolution_multiplies(layer: nn.Conv2d) -> None:
    layer = check.randomise(layer).double()
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    patches = unfold(layer, x).unflatten(1, (layer.groups, -1))
    weight = layer.weight.flatten(1).unflatten(0, (layer.groups, -1))
    y = torch.einsum("gok,ngkp->ngop", weight, patches).flatten(1, 2) + layer.bias.view(-1, 1)
    torch.testing.assert_close(y, layer(x).flatten(2))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_closed_form_finds_a_convolution_that_exists(groups: int) -> None:
    wanted = check.randomise(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups)).double()
    layer = check.randomise(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups), 1).double()
    x = torch.randn(6, 4, 12, 11, dtype=torch.float64)
    equations = NormalEquations(layer, 6 * 36)
    for part in x.split(2):
        equations.add(part, wanted(part).detach())
    assert equations.error() > 0.1
    equations.solve()
    torch.testing.assert_close(layer.weight, wanted.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias, wanted.bias, rtol=1e-4, atol=1e-4)
    assert equations.error() < 1e-8


def test_the_closed_form_is_that_of_lstsq() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = check.randomise(nn.Conv2d(2, 3, (2, 3), padding=(0, 1)))
    x = torch.randn(5, 2, 8, 7, generator=generator)
    y = torch.randn(5, 3, 7, 7, generator=generator)
    equations = NormalEquations(layer, 5 * 49)
    equations.add(x, y)
    equations.solve(0.0)
    rows = unfold(layer, x).transpose(1, 2).flatten(0, 1).double()
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    right = y.flatten(2).transpose(1, 2).flatten(0, 1).double()
    best = torch.linalg.lstsq(rows, right).solution
    torch.testing.assert_close(equations.weights()[0], best, rtol=1e-4, atol=1e-5)
    left = (rows @ best - right).square().sum() / (right - right.mean(0)).square().sum()
    assert equations.error() == pytest.approx(float(left), rel=1e-4)


def test_importance_counts_a_place_as_often() -> None:
    layer, same = (check.randomise(nn.Conv2d(2, 3, 1)) for _ in range(2))
    x, y = torch.randn(2, 2, 5, 5), torch.randn(2, 3, 5, 5)
    weighted, repeated = NormalEquations(layer, 50), NormalEquations(same, 75)
    weighted.add(x, y, torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 5, 5))
    repeated.add(x[[0, 1, 1]], y[[0, 1, 1]])
    weighted.solve()
    repeated.solve()
    torch.testing.assert_close(layer.weight, same.weight)


def test_a_fit_is_closer_than_where_it_started_and_reports_it() -> None:
    gm = trace(network(), batches()[0])
    fits = fit(gm, PLAN, batches(), SCHEME, distilled=False)
    (report,) = fits.reports
    assert report.step == str(PLAN)
    assert report.images == 32
    assert report.steps == 0
    assert 0 < report.error_float < 0.5
    assert report.error_int8 >= report.error_float * 0.99
    x = torch.randn(64, *SHAPE)
    start, fitted = rewrite(gm, PLAN), rewrite(gm, PLAN, fits.weights)
    errors = [float((m(x) - gm(x)).square().mean()) for m in (start, fitted)]
    assert errors[1] < errors[0] / 3


def test_distilling_never_ends_worse_on_what_was_held_out() -> None:
    from rewriter.damage import fidelity_of

    gm = trace(network(), batches()[0])
    x = torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(9))
    found: list[float] = []
    for distilled in (False, True):
        fits = fit(gm, PLAN, batches(8), SCHEME, distilled=distilled)
        answers = rewrite(gm, PLAN, fits.weights)(x)
        found.append(float(fidelity_of(gm, batches(8)).damage([answers], [gm(x)]).mean()))
    assert found[1] < found[0] * 1.05


def test_the_same_seed_gives_the_same_weights() -> None:
    gm = trace(network(), batches()[0])
    first, second = (fit(gm, PLAN, batches(), SCHEME, seed=3).weights[str(PLAN)] for _ in "ab")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_original_is_not_touched() -> None:
    gm = trace(network(), batches()[0])
    state, code = {k: v.clone() for k, v in gm.state_dict().items()}, gm.code
    fit(gm, PLAN, batches(), SCHEME)
    assert gm.code == code
    assert all(torch.equal(v, state[k]) for k, v in gm.state_dict().items())


def test_exact_and_empty_plans_need_no_fit() -> None:
    gm = trace(network(), batches()[0])
    assert fit(gm, Plan.parse("keep_float@_2"), [], SCHEME).reports == ()
    with pytest.raises(QuantizeError, match="no input"):
        fit(gm, PLAN, [], SCHEME)


# ------------------------------------------------------------------------------- the store


def test_what_was_fitted_is_read_and_not_fitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = trace(network(), batches()[0])
    data = batches()
    profile(gm, data)
    first = fit(gm, PLAN, data, SCHEME, tmp_path)
    monkeypatch.setattr(sys.modules["rewriter.fitting.fit"], "_fit_step", None)
    again = fit(gm, PLAN, batches(), SCHEME, tmp_path)  # equal data, other tensors
    assert again.reports == first.reports
    for k, v in first.weights[str(PLAN)].items():
        assert torch.equal(v, again.weights[str(PLAN)][k])
    assert assemble(gm, PLAN, SCHEME, data, tmp_path).fits == first.reports


@pytest.mark.parametrize("changed", ["data", "weights", "seed", "scheme"])
def test_a_fit_of_anything_else_is_made_anew(tmp_path: Path, changed: str) -> None:
    gm, data, scheme, seed = trace(network(), batches()[0]), batches(), SCHEME, 0
    fit(gm, PLAN, data, scheme, tmp_path, seed, distilled=False)
    if changed == "data":
        data[1][0, 0, 0, 0] += 1e-3
    elif changed == "weights":
        gm.get_submodule("8").bias.data[0] += 1e-3
    elif changed == "seed":
        seed = 1
    else:
        scheme = target("per_tensor")
    fit(gm, PLAN, data, scheme, tmp_path, seed, distilled=False)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_digests_are_those_of_the_values() -> None:
    a, b = batches(2), batches(2)
    assert data_digest(a) == data_digest(b)
    assert data_digest(a) != data_digest(a[:1])
    b[0].add_(1e-6)  # also when the tensor is the same object
    assert data_digest(a) != data_digest(b)
    one, two = (trace(network(), a[0]) for _ in range(2))
    assert graph_digest(one) == graph_digest(two)


@pytest.mark.parametrize("damage", [b"", b"not a file of tensors", None])
def test_a_damaged_file_is_no_fit(tmp_path: Path, damage: bytes | None) -> None:
    save_to(tmp_path, "ab12", {"w": torch.arange(5.0)}, {"n": 1})
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-3] if damage is None else damage)
    assert load(tmp_path, "ab12") is None


def test_nothing_is_left_of_a_write_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("rewriter.storage.files.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_to(tmp_path, "ab12", {"w": torch.zeros(2)}, {})
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert load(tmp_path, "ab12") is None


def _write(store: Path, seed: int) -> None:
    for _ in range(30):
        save_to(store, "ab12", {"w": torch.full((4096,), float(seed))}, {"seed": seed})


@pytest.mark.slow
def test_a_reader_beside_two_writers_sees_whole_files_even_when_one_is_killed(
    tmp_path: Path,
) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, i)) for i in (1, 2)]
    for writer in writers:
        writer.start()
    seen = 0
    end = time.monotonic() + 60
    while (any(w.is_alive() for w in writers) or not seen) and time.monotonic() < end:
        found = load(tmp_path, "ab12")
        if found is not None:
            seen += 1
            assert bool((found[0]["w"] == float(found[1]["seed"])).all())
            if seen == 5:
                writers[0].kill()
    for writer in writers:
        writer.join()
    assert seen
    assert isinstance(load(tmp_path, "ab12"), tuple)


def test_a_report_is_plain_facts() -> None:
    assert FitReport("a@b", 0.1, 0.2, 3, 4, 5.0) == FitReport("a@b", 0.1, 0.2, 3, 4, 5.0)


@pytest.fixture
def meta_by_default() -> Iterator[None]:
    """What is made without naming a device lands where it cannot be mixed with anything."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_a_fit_names_the_device_of_all_that_it_makes(request: pytest.FixtureRequest) -> None:
    """The way to see on a CPU that nothing stays behind when a fit is made on a GPU."""
    gm, data = trace(network(), batches(1)[0][:2]), batches()
    expected = fit(gm, PLAN, data, SCHEME).weights
    request.getfixturevalue("meta_by_default")
    found = fit(gm, PLAN, data, SCHEME).weights
    for step, state in expected.items():
        for name, value in state.items():
            assert torch.equal(found[step][name], value), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_fit_on_a_gpu_is_the_fit() -> None:
    gm, data = trace(network(), batches(1)[0][:2]), batches()
    here = fit(gm, PLAN, data, SCHEME, distilled=False).weights
    there = fit(gm, PLAN, data, SCHEME, distilled=False, device="cuda").weights
    for step, state in here.items():
        for name, value in state.items():
            torch.testing.assert_close(there[step][name], value, rtol=1e-3, atol=1e-4)
