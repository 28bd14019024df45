from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter import Plan, target
from rewriter.assemble import assemble
from rewriter.graph import facts
from rewriter.int8.simulate import simulate
from rewriter.rules.scale_norm import ScaleNorm
from tests.rules import check

RULE = ScaleNorm()
SHAPE = (7, 16)


def outlier(model: nn.Module, factor: float = 60.0) -> nn.Module:
    """The model, random, with two channels of each layer norm much larger than the others, undone behind it."""
    check.randomise(model)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.LayerNorm) and m.elementwise_affine:
                m.weight[:2] *= factor
                m.bias[:2] *= factor
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                m.weight[:, :2] /= factor
    return model


class Next(nn.Module):
    """A norm of the features of a picture, read by a convolution of the usual layout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.down = (
            nn.Conv2d(3, 16, 3),
            nn.LayerNorm(16),
            nn.Conv2d(16, 8, 2, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Windows(nn.Module):
    """Windows of a picture, and the mean of all places."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.last = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        y = self.norm(x).reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        return self.b(self.last(self.a(y) + y.square()).mean(1))


def sites(model: nn.Module, shape: tuple[int, ...]) -> int:
    gm = check.graph_of(outlier(model), shape, "onnxruntime")
    found = check.sites_of(RULE, gm)
    for site in found:
        check.check_site(RULE, gm, site, shape)
    return len(found)


def test_the_function_is_kept() -> None:
    heads = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5))
    assert sites(heads, SHAPE) == 1
    assert sites(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5, bias=False)), (16,)) == 1
    assert sites(Next(), (3, 11, 9)) == 1


def test_channels_are_followed_through_windows_and_means() -> None:
    gm = check.graph_of(outlier(Windows()), (4, 6, 16), "onnxruntime")
    reasons = {s.anchor: s.blocked for s in RULE.match(gm)}
    assert reasons["last"] == ""
    assert "which reads it, is no layer" in reasons["norm"]  # its square is read as well
    for site in check.sites_of(RULE, gm):
        check.check_site(RULE, gm, site, (4, 6, 16))


@pytest.mark.parametrize("on", ["onnxruntime", "tensorrt"])
def test_the_error_falls_where_an_outlier_was_planted(on: str) -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24))
    gm = check.graph_of(outlier(model, 100.0), SHAPE, on).float()
    x = check.inputs(SHAPE, 16).float()
    left: list[float] = []
    for text in ("", "scale_norm@_0"):
        made = assemble(gm, Plan.parse(text), target(on), [x]).quantized
        with torch.no_grad():
            left.append(float((simulate(made)(x) - gm(x)).square().mean()))
    assert left[1] < 0.05 * left[0], left


def test_ranges_are_known_afterwards() -> None:
    gm = check.graph_of(outlier(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5))), SHAPE)
    new = check.check_site(RULE, gm, check.sites_of(RULE, gm)[0], SHAPE)
    (node,) = new.graph.find_nodes(op="call_module", target="0")
    low, high = facts.CHANNEL_RANGE.of(node)
    value = new.get_submodule("0")(check.calibration(SHAPE)[1])
    torch.testing.assert_close(high, value.amax((0, 1)))
    torch.testing.assert_close(low, value.amin((0, 1)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5)), "is no layer"),
        (
            nn.Sequential(nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 5)),
            "no weights",
        ),
        (nn.Sequential(nn.LayerNorm([7, 16]), nn.Linear(16, 5)), "over several axes"),
        (nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5)), "of the rounding error"),
    ],
)
def test_refuses(model: nn.Module, reason: str) -> None:
    with torch.no_grad():
        gm = check.graph_of(model.eval(), SHAPE)
    assert not check.sites_of(RULE, gm)
    assert any(reason in s.blocked for s in RULE.match(gm)), list(RULE.match(gm))


def test_without_ranges_nothing_is_known() -> None:
    gm = check.graph_of(outlier(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5))), SHAPE)
    for node in gm.graph.nodes:
        facts.CHANNEL_RANGE.drop(node)
    assert [s.blocked for s in RULE.match(gm)] == ["no calibrated channel ranges"]


def test_ignores_batch_norms() -> None:
    check.ignores(RULE, nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), (3, 8, 8))
