from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import Plan, find_sites, profile, rewrite, trace
from rewriter.damage.fidelity import kl_divergence
from rewriter.damage.fisher import _middles, weigh
from rewriter.graph.lookup import find, layers, module_of
from tests.rules import check

SHAPE = (3, 9, 8)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1, groups=5)
        self.act, self.head = nn.SiLU(), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.dw(self.act(self.stem(x)))).mean((2, 3)))


def test_predicts_the_divergence_that_small_independent_errors_cause() -> None:
    """1/2 sum_c F_c sigma_c^2 against the measured mean KL of noise in one value."""
    x = check.inputs(SHAPE, 24)
    gm = trace(check.randomise(Classifier()), x.float()).double()
    weigh(gm, [x] * 40, inputs=960)  # many draws of the answers
    node = layers(gm)[0]
    layer = module_of(gm, node)
    generator = torch.Generator().manual_seed(5)
    for channel in range(5):
        noise = 0.2 * torch.randn(24 * 50, 1, 9, 8, generator=generator, dtype=torch.float64)

        def disturb(
            m: nn.Module, args: tuple[Tensor], y: Tensor, c: int = channel, d: Tensor = noise
        ) -> Tensor:
            y = y.clone()
            y[:, c : c + 1] += d
            return y

        many = x.repeat(50, 1, 1, 1)
        exact = gm(many)
        hook = layer.register_forward_hook(disturb)  # type: ignore[arg-type]
        measured = float(kl_divergence(gm(many), exact).mean())
        hook.remove()
        predicted = 0.5 * float(node.meta["influence"][channel]) * 0.2**2
        assert predicted == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 1),
        nn.Conv2d(6, 6, 1, groups=6),
        nn.Conv2d(6, 9, 1, groups=3),
        nn.Conv2d(6, 12, 1, groups=6, stride=2),
        nn.Conv1d(6, 4, 1),
        nn.Linear(6, 4),
    ],
)
def test_weight_influence_is_the_square_of_each_samples_gradient(layer: nn.Module) -> None:
    sizes = {nn.Linear: (6,), nn.Conv1d: (6, 7)}
    shape = sizes.get(type(layer), (6, 7, 5))
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    model = check.randomise(nn.Sequential(layer, nn.Flatten(), nn.Tanh()))
    gm = trace(model, x).double()
    weigh(gm, [x.double()])
    (node,) = layers(gm)
    m = module_of(gm, node)
    # the same projections again, one sample at a time, with the root of Fisher's matrix written out
    p = gm(x.double()).softmax(1)
    signs = (
        torch.randint(0, 2, p.shape, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    )
    total = torch.zeros_like(m.weight)
    m.weight.requires_grad_(True)
    steps = [slice(None, None, s) for s in getattr(layer, "stride", ())]
    read = x.double()[(..., *steps)] if steps else x.double()
    centered = x.double() - read.mean([d for d in range(x.ndim) if d != 1], keepdim=True)
    for i in range(4):
        without_bias: dict[str, Any] = {"weight": m.weight, "bias": None}
        out = m(x[i : i + 1].double())
        z = out.detach().requires_grad_(True)
        root = p[i].sqrt().diag() - torch.outer(p[i], p[i].sqrt())
        assert torch.allclose(root @ root.T, p[i].diag() - torch.outer(p[i], p[i]))
        g = torch.autograd.grad(torch.tanh(z.flatten(1))[0], z, root @ signs[i])[0]
        through = torch.autograd.grad(
            torch.func.functional_call(m, without_bias, (centered[i : i + 1],)),
            m.weight,
            g,
        )[0]
        total += through**2
    expected = total.flatten(2).sum(2) / 4 if total.ndim > 2 else total / 4
    torch.testing.assert_close(
        node.meta["weight_influence"], expected.detach(), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize(
    ("layer", "first"),
    [
        (nn.Conv2d(1, 1, 3, padding=1, stride=2), [0, 0]),
        (nn.Conv2d(1, 1, (5, 3)), [2, 1]),
        (nn.Conv2d(1, 1, 3, padding="same", dilation=2), [0, 0]),
        (nn.Conv1d(1, 1, 7, padding=1), [2]),
    ],
)
def test_the_middle_weight_stands_for_a_filter(layer: nn.Conv2d, first: list[int]) -> None:
    assert _middles(layer) == first


def test_other_outputs_count_relative_to_their_size() -> None:
    class Two(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.stem, self.factor = nn.Conv2d(3, 4, 3), factor
            self.a, self.b = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.relu(self.stem(x))
            return self.a(x), self.b(x) * self.factor

    x = check.inputs(SHAPE, 6).float()
    found = []
    for factor in (1.0, 1000.0):
        torch.manual_seed(3)
        model = Two(factor)
        gm = trace(check.randomise(model), x)
        weigh(gm, [x])
        found.append(find(gm, "stem").meta["influence"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0)


def test_weights_stay_as_they_were() -> None:
    x = check.inputs(SHAPE, 6).float()
    gm = trace(check.randomise(Classifier()), x)
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    weigh(gm, [x], inputs=4)
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())
    assert not any(p.requires_grad for p in gm.parameters())


def test_what_was_measured_of_a_layer_that_has_changed_since_is_dropped() -> None:
    """A plan may merge layers and then rescale them, on a graph whose influences are of the old ones."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 7, 1), nn.ReLU(), nn.Conv2d(7, 7, 3, groups=7), nn.ReLU()]
    gm = trace(
        nn.Sequential(*layers, nn.Conv2d(7, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval(),
        torch.rand(2, 3, 9, 9),
    )
    batches = [torch.rand(4, 3, 9, 9)]
    profile(gm, batches)
    weigh(gm, batches)
    for rule in ("merge_separable", "fuse_expand"):
        for site in find_sites(gm):
            if site.rule == rule and not site.blocked:
                made = rewrite(gm, Plan.parse(f"{rule}@{site.anchor} equalize@model"))
                assert bool(torch.isfinite(made(torch.rand(2, 3, 9, 9))).all())
