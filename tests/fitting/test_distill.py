from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter import Plan, PlanError, rewrite, target, trace
from rewriter.damage.fidelity import kl_divergence
from rewriter.fitting.distill import BUDGET, MEMORY, PIECE, SEEN, VIEWS, amounts, distill
from rewriter.fitting.fit import FitReport, fit, neighbors
from rewriter.graph.lookup import find, module_of
from rewriter.plan import Step
from tests.rules import check

SHAPE = (3, 20, 18)
SCHEME = target("onnxruntime")
FIRST, SECOND = Step("merge_separable", "dw1"), Step("merge_separable", "dw2")
AFTER = ("dw2", "pw2", "dw3")


class Blocks(nn.Module):
    """A stem, three depthwise separable blocks (the last with a shortcut), a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2)
        for i in (1, 2, 3):
            self.add_module(f"dw{i}", nn.Conv2d(6, 6, 3, padding=1, groups=6))
            self.add_module(f"pw{i}", nn.Conv2d(6, 6, 1))
        self.act, self.pool = nn.ReLU6(), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 5)
        check.randomise(self)
        with torch.no_grad():
            self.stem.weight *= 4  # so that the caps matter
            self.fc.weight *= 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        for i in (1, 2):
            x = self.get_submodule(f"pw{i}")(self.act(self.get_submodule(f"dw{i}")(x)))
        y = self.get_submodule("pw3")(self.act(self.get_submodule("dw3")(x)))
        return self.fc(self.pool(x + y).flatten(1))


def batches(count: int = 4, size: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, *SHAPE, generator=generator) for _ in range(count)]


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.fitting.distill.SEEN", 320)


@pytest.mark.parametrize("with_others", [False, True])
@pytest.mark.usefixtures("few_steps")
def test_distilling_brings_the_answers_nearer(
    with_others: bool, caplog: pytest.LogCaptureFixture
) -> None:
    gm = trace(Blocks(), batches()[0])
    made = rewrite(gm, Plan((FIRST,)))  # as it starts: the activation is ignored
    x = torch.cat(batches(6)[4:])
    with torch.no_grad():
        before = float(kl_divergence(made(x), gm(x)).mean())
    node = find(made, "pw1")
    others = [find(made, name) for name in AFTER] if with_others else []
    with caplog.at_level(logging.INFO, "rewriter.fitting.distill"):
        steps = distill(gm, made, node, batches(), SCHEME, SCHEME.activations.params(0, 6), others)
    assert steps > 0
    assert "held-out damage" in caplog.text
    with torch.no_grad():
        after = float(kl_divergence(made(x), gm(x)).mean())
    assert after < 0.7 * before
    for name in (*AFTER, "stem", "pw3", "fc"):
        was, now = (module_of(g, find(g, name)).weight for g in (gm, made))
        assert torch.equal(was, now) is not (with_others and name in AFTER)
        assert not now.requires_grad
        assert now.grad is None


@pytest.mark.usefixtures("few_steps")
def test_a_fit_holds_the_layers_that_were_moved() -> None:
    gm = trace(Blocks(), batches()[0])
    plan = Plan((FIRST,))
    fits = fit(gm, plan, batches(), SCHEME)
    state, (report,) = fits.weights[str(FIRST)], fits.reports
    moved = {name.partition(".")[0] for name in state if "." in name}
    assert moved == (set(AFTER) if report.steps else set())
    made = rewrite(gm, plan, fits.weights)
    for name in moved:
        assert torch.equal(module_of(made, find(made, name)).weight, state[f"{name}.weight"])


def test_a_layer_that_another_step_replaces_is_no_neighbor() -> None:
    gm = trace(Blocks(), batches()[0])
    assert neighbors(gm, Plan((FIRST,))) == {FIRST: AFTER}
    assert neighbors(gm, Plan((FIRST, SECOND))) == {FIRST: (), SECOND: ("dw3", "pw3", "fc")}
    third = Step("merge_separable", "dw3")
    # both would move the classifier: the first of them in the plan does
    found = neighbors(gm, Plan((SECOND, third)))
    assert found == {SECOND: (), third: ("fc",)}
    # what comes after the fitted layers are in place does not matter
    kept = Plan.parse("keep_float@dw2 equalize@model split_range_2@dw2")
    assert neighbors(gm, Plan((FIRST, *kept.steps)))[FIRST] == AFTER


@pytest.mark.usefixtures("few_steps")
def test_steps_side_by_side_are_fitted_alone_and_keep_each_others_layers() -> None:
    gm = trace(Blocks(), batches()[0])
    plan = Plan((FIRST, SECOND))
    fits = fit(gm, plan, batches(), SCHEME)
    assert not [name for name in fits.weights[str(FIRST)] if "." in name]
    made = rewrite(gm, plan, fits.weights)
    x = batches(6)[5]
    with torch.no_grad():
        assert torch.isfinite(made(x)).all()
    strange = {str(FIRST): {**fits.weights[str(FIRST)], "conv9.weight": torch.zeros(1)}}
    with pytest.raises(PlanError, match="fitted weights are of 'conv9' too"):
        rewrite(gm, plan, strange)


def test_layers_that_share_their_weights_are_no_neighbors() -> None:
    model = Blocks()
    model.get_submodule("pw2").weight = model.get_submodule("pw3").weight
    gm = trace(model, batches()[0])
    assert neighbors(gm, Plan((FIRST,))) == {FIRST: ("dw2", "dw3", "fc")}


@settings(max_examples=200, deadline=None)
@given(
    images=st.integers(1, 5000),
    macs=st.integers(0, 10**12),
    numbers=st.integers(0, 10**9),
)
def test_a_fit_stays_within_its_budget(images: int, macs: int, numbers: int) -> None:
    found = amounts(images, macs, numbers)
    least = min(images, 2 * PIECE)  # so few are fitted on however much they take
    assert least <= found.images <= images
    assert 1 <= found.views <= VIEWS
    assert found.epochs >= 1
    seen = found.images * found.views * found.epochs
    if found.images > least or found.views > 1:
        assert 0.8 * seen * 3 * macs <= 2 * BUDGET
        assert 0.8 * 4 * found.images * found.views * numbers <= MEMORY
    assert seen <= 2 * max(SEEN, 2 * PIECE)


def test_a_bigger_network_is_shown_fewer_images() -> None:
    small, large = (amounts(100, macs, 10**5) for macs in (10**7, 4 * 10**8))
    assert small.views * small.epochs > large.views * large.epochs
    assert amounts(100, 10**12, 10**5).images == 2 * PIECE


@pytest.mark.usefixtures("few_steps")
def test_fits_of_another_rule_version_are_made_anew(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pathlib import Path

    from rewriter.rules import RULES

    assert isinstance(tmp_path, Path)
    gm = trace(Blocks(), batches()[0])
    plan = Plan((FIRST,))

    def made() -> FitReport:
        (report,) = fit(gm, plan, batches(2), SCHEME, tmp_path, distilled=False).reports
        return report

    first = made()
    assert made() == first  # its seconds too: it was read
    rule = next(r for r in RULES if r.name == "merge_separable")
    monkeypatch.setattr(type(rule), "version", rule.version + 1)
    assert made().seconds != first.seconds
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
