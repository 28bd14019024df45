from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter import Plan, PlanError, rewrite, target
from rewriter.fitting.activations import fitted_shape
from rewriter.fitting.fit import fit
from rewriter.rules.replace_activation import KINDS, ReplaceActivation
from tests.rules import check

RULES = {kind: ReplaceActivation(kind) for kind in KINDS}
SHAPE = (3, 13, 10)
SCHEME = target("onnxruntime")


def two(act: nn.Module, reader: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), act, reader or nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.Mish(), nn.GELU("tanh")])
def test_each_function_is_replaced_by_each(kind: str, act: nn.Module) -> None:
    new = check.rewrites(RULES[kind], two(act), SHAPE)
    assert type(new.get_submodule("1")) is KINDS[kind]


def test_a_hardswish_is_not_replaced_by_itself() -> None:
    check.rewrites(RULES["relu"], two(nn.Hardswish()), SHAPE)
    check.ignores(RULES["hardswish"], two(nn.Hardswish()), SHAPE)


def test_linear_layers_of_sequences() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 5))
    for rule in RULES.values():
        check.rewrites(rule, model, (7, 6))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act = nn.Conv2d(3, 8, 3), nn.Hardswish()
        self.gate, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        return self.b(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())


def test_behind_a_gate_the_readers_are_those_of_both_ways() -> None:
    gm = check.graph_of(check.randomise(Gated()), SHAPE)
    (site,) = check.sites_of(RULES["relu"], gm)
    assert site.nodes == ("a", "act")
    assert site.readers == ("gate", "b")
    check.refuses(RULES["relu"], two(nn.ReLU(), nn.SiLU()), "which it reads, is no layer", SHAPE)
    assert not list(RULES["relu6"].match(gm))  # a near miss is shown once, by the first rule


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.MaxPool2d(2), nn.SiLU(), nn.Conv2d(3, 4, 1)), "is no layer"),
        (two(nn.SiLU(), nn.Flatten()), "no layer reads the value"),
        (
            nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.SiLU(), nn.Conv2d(8, 2, 1)),
            "a ConvTranspose2d is not refitted",
        ),
    ],
)
def test_refuses(model: nn.Module, reason: str) -> None:
    check.refuses(RULES["relu"], model, reason, SHAPE)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(nn.functional.silu(x) + x)


def test_refuses_a_layer_that_others_read() -> None:
    check.refuses(RULES["relu"], Twice(), "a is read by 2 nodes", SHAPE)


def test_ignores_other_activations() -> None:
    for rule in RULES.values():
        check.ignores(rule, two(nn.ReLU6()), SHAPE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shape_of_what_the_new_function_can_make_is_found(kind: str) -> None:
    """Planted: f is the new function, with a slope, shift, scale and offset of the grid."""
    z = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = KINDS[kind]()
    slope = 1.25 if kind == "hardswish" else 1.0
    if kind == "relu6":
        slope = 6 / (z.amax(0) + 0.5)
    wanted = 0.7 * made(slope * (z + 0.5)) - 0.2
    found = fitted_shape(z, wanted, made, free=True)
    again = found.scale * made(found.slope * z + found.shift) + found.offset
    torch.testing.assert_close(again, wanted, rtol=1e-6, atol=1e-6)


def test_without_readers_that_take_it_there_is_no_scale() -> None:
    z = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = fitted_shape(z, 3 * nn.Hardswish()(z), nn.Hardswish(), free=False)
    assert bool((found.scale == 1).all())
    found = fitted_shape(z, 3 * nn.ReLU()(z), nn.ReLU(), free=False)
    torch.testing.assert_close(found.scale, torch.full((3,), 3.0, dtype=torch.float64))


def deep() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 12, 3, 2, 1), nn.SiLU()]
    for _ in range(2):
        layers += [
            nn.Conv2d(12, 12, 3, 1, 1, groups=12),
            nn.SiLU(),
            nn.Conv2d(12, 12, 1),
            nn.SiLU(),
        ]
    return check.randomise(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    )


def relative_error(gm: nn.Module, new: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, b = gm(x), new(x)
    return float((a - b).square().sum() / (a - a.mean(0)).square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_fitted_it_is_nearly_the_function_that_it_was(kind: str) -> None:
    gm = check.graph_of(deep(), (3, 16, 16)).float()
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    plan = Plan.parse(" ".join(f"replace_activation_{kind}@{n}" for n in ("_0", "_4")))
    fits = fit(gm, plan, [x[:32], x[32:]], SCHEME, distilled=False)
    assert [r.step for r in fits.reports] == [str(s) for s in plan.steps]
    fresh = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    swapped = relative_error(gm, rewrite(gm, plan), fresh)
    fitted = relative_error(gm, rewrite(gm, plan, fits.weights), fresh)
    assert fitted < 0.35 * swapped, (fitted, swapped)


def test_a_step_that_comes_later_is_fitted_on_top_of_one_before() -> None:
    gm = check.graph_of(deep(), (3, 16, 16)).float()
    x = [torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))]
    first, second = "replace_activation_relu@_2", "replace_activation_relu@_4"
    alone = fit(gm, Plan.parse(second), x, SCHEME, distilled=False).weights[second]
    both = fit(gm, Plan.parse(f"{first} {second}"), x, SCHEME, distilled=False).weights
    assert not torch.equal(both[second]["weight"], alone["weight"])
    only = fit(gm, Plan.parse(first), x, SCHEME, distilled=False).weights[first]
    assert all(torch.equal(both[first][k], v) for k, v in only.items())


def test_a_plan_with_a_step_that_does_not_apply_is_refused() -> None:
    gm = check.graph_of(deep(), (3, 16, 16)).float()
    plan = Plan.parse("replace_activation_relu@_0 replace_activation_hardswish@_0")
    with pytest.raises(PlanError, match="both change _0"):
        fit(gm, plan, [torch.randn(4, 3, 16, 16)], SCHEME)


def test_a_channel_that_hardly_leaves_zero_passes_a_relu_with_its_own_range() -> None:
    """Planted: values of a few hundredths, where SiLU is half of what it reads."""
    z = 0.02 * torch.randn(
        4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    wanted = nn.SiLU()(z)
    found = fitted_shape(z, wanted, nn.ReLU(), free=True)
    value = found.scale * nn.ReLU()(z + found.shift)
    left = (value + found.offset - wanted).square().mean() / wanted.var()
    assert float(left) < 1e-3
    assert float(value.amax()) < 3 * float(wanted.amax() - wanted.amin())  # no constant of 1 in it


def uneven() -> nn.Module:
    """Channels whose sizes span four decades, undone by the reader, as batch norms leave them."""
    model = deep()
    size = torch.logspace(-2.5, 1.5, 12)
    with torch.no_grad():
        model[0].weight.mul_(size.view(-1, 1, 1, 1))
        model[0].bias.mul_(size)
        model[2].weight.div_(size.view(-1, 1, 1, 1).clamp_max(1))
    return model


def test_narrow_channels_are_not_given_up_beside_wide_ones() -> None:
    gm = check.graph_of(uneven(), (3, 16, 16)).float()
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    plan = Plan.parse("replace_activation_relu@_0")
    fits = fit(gm, plan, [x], SCHEME)
    fresh = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    assert relative_error(gm, rewrite(gm, plan, fits.weights), fresh) < 0.02
