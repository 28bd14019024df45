from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter import quantize, rewrite, simulate, target, trace
from rewriter.graph.channel_ranges import profile
from rewriter.plan import Plan
from rewriter.rules.split_range import SplitRange, SplitWeights, multiple_of
from rewriter.surgery.group_channels import group_by_range, rounding_error
from tests.rules import check

RULE = SplitRange(2)
SHAPE = (3, 17, 15)
POINTWISE = [
    nn.SiLU(),
    nn.Hardswish(),
    nn.ReLU6(),
    nn.GELU(),
    nn.PReLU(8),
    nn.PReLU(),
    nn.Sigmoid(),
    nn.LeakyReLU(0.2),
    nn.Hardtanh(-1, 20),
]


def stem(out: int = 8, **kw: object) -> nn.Conv2d:
    return nn.Conv2d(3, out, 3, **kw)  # type: ignore[arg-type]


def rewritten(
    model: nn.Module, rule: SplitRange = RULE, shape: tuple[int, ...] = SHAPE
) -> list[fx.GraphModule]:
    """Assert the contract at every site of a random model with uneven layers."""
    gm = check.graph_of(check.spread(check.randomise(model)), shape)
    # a split that gains little must be as exact as one that gains much
    sites = [s for s in rule.match(gm) if not s.blocked or "rounding error" in s.blocked]
    assert sites, list(rule.match(gm))
    return [check.check_site(rule, gm, site, shape) for site in sites]


@pytest.mark.parametrize("act", POINTWISE)
def test_any_pointwise_activation_is_passed(act: nn.Module) -> None:
    rewritten(nn.Sequential(stem(stride=2), act, nn.Conv2d(8, 5, (1, 3), dilation=2)))


@pytest.mark.parametrize(
    "depthwise",
    [
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.Conv2d(8, 8, (2, 3), groups=8, stride=2, bias=False),
        nn.Conv2d(8, 8, 3, groups=8, padding="same", dilation=2, padding_mode="reflect"),
    ],
)
def test_depthwise_readers_are_split_exactly(depthwise: nn.Module) -> None:
    rewritten(nn.Sequential(stem(), nn.SiLU(), depthwise, nn.ReLU6(), nn.Conv2d(8, 4, 1)))


@pytest.mark.parametrize(
    "between",
    [
        nn.MaxPool2d(2),
        nn.AvgPool2d(3, 2, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ZeroPad2d((1, 0, 2, 1)),
    ],
)
def test_spatial_operations_are_passed(between: nn.Module) -> None:
    rewritten(nn.Sequential(stem(), nn.Hardswish(), between, nn.Conv2d(8, 4, 2)))


def test_other_dense_layers_make_and_read_the_channels() -> None:
    rewritten(
        nn.Sequential(
            nn.ConvTranspose2d(3, 8, 3, stride=2, output_padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(8, 7, 2, bias=False),
            nn.Mish(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(7, 9),
            nn.GELU(),
            nn.Linear(9, 3, bias=False),
        )
    )


class Residual(nn.Module):
    """Skip connections: a sum, a layer that reads and adds to one value, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = stem(9), nn.Conv2d(9, 9, 3, padding=1)
        self.expand, self.depth = nn.Conv2d(9, 18, 1), nn.Conv2d(18, 18, 3, padding=1, groups=18)
        self.project, self.last = nn.Conv2d(18, 9, 1), nn.Conv2d(9, 4, 1)
        self.down, self.up = nn.Conv2d(9, 4, 1), nn.Conv2d(4, 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.inner(x)
        y = self.project(torch.nn.functional.silu(self.depth(self.expand(x))))
        gate = torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return self.last(x + y * gate)


@pytest.mark.parametrize("rule", [SplitRange(2), SplitRange(3), SplitRange(4), SplitWeights(2)])
def test_sums_products_and_gates_are_split_alike(rule: SplitRange) -> None:
    rewritten(Residual(), rule)


def test_all_sites_together_are_exact_too() -> None:
    gm = check.graph_of(check.spread(check.randomise(Residual())), SHAPE)
    x = check.inputs(SHAPE)
    steps = [f"{s.rule}@{s.anchor}" for s in check.sites_of(RULE, gm)]
    assert len(steps) >= 2
    new = check.rewritten_by_plan(gm, *steps)
    torch.testing.assert_close(new(x), gm(x), rtol=1e-9, atol=1e-9)
    check.assert_shapes(new, x)


class ReadElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = stem(), nn.Conv2d(8, 3, 1), nn.Conv2d(11, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = torch.nn.functional.silu(self.stem(x))
        y = self.b(torch.cat([x, x[:, :3]], 1))
        return self.a(x), y, x.flatten(1), x


def test_other_readers_get_the_channels_in_the_old_order() -> None:
    (new,) = rewritten(ReadElsewhere())
    assert sum(n.target is torch.index_select for n in new.graph.nodes) == 1


def test_macs_are_the_same() -> None:
    from rewriter import cost

    gm = check.graph_of(check.spread(check.randomise(Residual())), SHAPE).float()
    before = cost(gm).macs
    for site in check.sites_of(RULE, gm):
        assert cost(rewrite(gm, Plan.parse(f"{site.rule}@{site.anchor}"))).macs == before


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(stem(3), nn.Conv2d(3, 2, 1)), "3 channels are too few"),
        (nn.Sequential(stem(), nn.Softmax(1)), "no convolution or linear layer reads"),
        (nn.Sequential(stem(), nn.Sigmoid(), nn.Conv2d(8, 2, 1)), "of the rounding error"),
    ],
)
def test_refuses(model: nn.Module, reason: str) -> None:
    check.refuses(RULE, model, reason, SHAPE)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = stem(3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.stem(x) + x)


def test_refuses_channels_that_no_layer_makes() -> None:
    check.refuses(RULE, Joined(), "which is no dense layer's output", SHAPE)


def test_refuses_without_calibrated_ranges() -> None:
    gm = trace(
        check.randomise(nn.Sequential(stem(), nn.SiLU(), nn.Conv2d(8, 2, 1))),
        torch.randn(1, *SHAPE),
    )
    assert {s.blocked for s in RULE.match(gm)} >= {"no calibrated channel ranges"}


def test_ignores_depthwise_and_grouped_layers() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.SiLU(), nn.Conv2d(4, 6, 1, groups=2))
    check.ignores(RULE, model, (4, 9, 9))


# ------------------------------------------------------------------------------- what it is for


def planted(wide: float) -> nn.Module:
    """A SiLU network with two channels far wider than the others, which matter as much."""
    net = check.randomise(
        nn.Sequential(
            stem(), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=8), nn.SiLU(), nn.Conv2d(8, 10, 1)
        )
    )
    with torch.no_grad():
        for layer in (net[0],):
            layer.weight[[1, 6]] *= wide
            layer.bias[[1, 6]] *= wide
        net[2].weight[[1, 6]] /= wide
    return net


def relative_error(model: nn.Module, plan: str) -> float:
    x = check.inputs(SHAPE, 16).float()
    gm = trace(model, x[:2])
    profile(gm, [x])
    new = rewrite(gm, Plan.parse(plan))
    int8 = simulate(quantize(new, target("onnxruntime"), [x]))
    with torch.no_grad():
        return float((int8(x) - gm(x)).square().mean() / gm(x).var())


def test_the_loss_of_one_shared_range_comes_back() -> None:
    plain, even = relative_error(planted(200.0), ""), relative_error(planted(1.0), "")
    split = relative_error(planted(200.0), "split_range_2@_0")
    assert plain > 20 * even  # the planted channels do hurt
    assert split < 3 * even
    assert (plain - split) / (plain - even) > 0.9


def test_groups_are_the_best_contiguous_cut() -> None:
    generator = torch.Generator().manual_seed(3)
    low = -torch.rand(7, generator=generator) * 3
    high = torch.rand(7, generator=generator).exp()
    order = (high - low).argsort().tolist()
    found = rounding_error(low, high, group_by_range(low, high, 3))
    cuts = [(0, i, j, 7) for i in range(1, 6) for j in range(i + 1, 7)]
    groups = [[order[a:b] for a, b in pairwise(cut)] for cut in cuts]
    assert found == pytest.approx(min(rounding_error(low, high, g) for g in groups))


def test_groups_have_as_many_channels_as_kernels_compute_at_once() -> None:
    """A depthwise layer of 16 channels is cut into 8 and 8, and never into three."""
    model = nn.Sequential(
        stem(16, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, groups=16, padding=1), nn.SiLU(),
        nn.Conv2d(16, 4, 1),
    )  # fmt: skip
    gm = check.graph_of(check.spread(check.randomise(model)), SHAPE)
    reason = "16 channels make at most 2 groups of multiples of 8"
    assert all(s.blocked == reason for s in SplitRange(3).match(gm) if "4 ch" not in s.blocked)
    two = [s for s in SplitRange(2).match(gm) if not s.blocked or "rounding" in s.blocked]
    made = check.check_site(SplitRange(2), gm, two[0], SHAPE)
    depthwise = [
        m.out_channels for m in made.modules() if isinstance(m, nn.Conv2d) and m.groups > 1
    ]
    assert depthwise == [8, 8]


@pytest.mark.parametrize(
    ("channels", "unit"), [(15, 1), (16, 8), (127, 8), (128, 16), (511, 16), (512, 32)]
)
def test_multiples_by_the_number_of_channels(channels: int, unit: int) -> None:
    assert multiple_of(channels) == unit
