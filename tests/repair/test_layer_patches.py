from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriter.repair.layer_patches import patches


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"),
        nn.Conv2d(6, 4, 3, groups=2, padding="same"),
        nn.Conv2d(4, 5, 1, stride=2, bias=False),
        nn.Conv1d(4, 6, 3, padding=2, stride=2),
        nn.Linear(7, 3),
    ],
)
def test_patches_times_weights_are_the_layers_outputs(layer: Any) -> None:
    shapes = {
        nn.Conv2d: (3, layer.weight.shape[1] * getattr(layer, "groups", 1), 9, 11),
        nn.Conv1d: (3, 4, 13),
        nn.Linear: (3, 5, 7),
    }
    x = torch.randn(shapes[type(layer)], generator=torch.Generator().manual_seed(1))
    (found,) = patches(layer, (x,), samples=3)
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.detach().flatten(1).unflatten(0, (groups, -1))
    made = (weight @ found).flatten(0, 1)  # (O, positions), in no particular order
    with torch.no_grad():
        expected = layer(x)
    if layer.bias is not None:
        made = made + layer.bias.detach()[:, None]
    expected = (
        expected.flatten(0, -2).T
        if isinstance(layer, nn.Linear)
        else expected.transpose(0, 1).flatten(1)
    )
    torch.testing.assert_close(made.sort(1).values, expected.sort(1).values, rtol=1e-4, atol=1e-5)


def test_patches_of_a_large_image_are_a_sample_of_the_same_places() -> None:
    layer = nn.Conv2d(8, 8, 5, padding=2)
    x = torch.randn(2, 8, 60, 60, generator=torch.Generator().manual_seed(1))
    a, b = patches(layer, (x, x + 1), samples=100_000, seed=4)
    assert a.shape[2] < 2 * 60 * 60
    inside = a.ne(0)  # the border is padded with zero, not with one
    torch.testing.assert_close(b[inside], a[inside] + 1)


def test_unfold_agrees_with_torch() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    x = torch.randn(1, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    (found,) = patches(layer, (x,), samples=1)
    torch.testing.assert_close(found, F.unfold(x, 3, padding=1))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_sample_of_a_depthwise_layer_is_the_same_by_channel_and_by_pixel(
    mode: Literal["zeros", "reflect"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small images are read channel by channel, large ones pixel by pixel; here both ways give outputs of the layer."""
    layer = nn.Conv2d(6, 6, 5, padding=2, stride=2, groups=6, bias=False, padding_mode=mode)
    weight = layer.weight.detach().flatten(1).unsqueeze(1)
    for module in ("FOR_ANY_FILTER", "FOR_EACH_WEIGHT"):
        monkeypatch.setattr(f"rewriter.repair.layer_patches.{module}", 12)
    for size, taken in ((7, 4), (40, 4)):
        x = torch.randn(3, 6, size, size, generator=torch.Generator().manual_seed(2))
        (found,) = patches(layer, (x,), samples=75)
        assert found.shape == (6, 25, 3 * 8 if size == 40 else found.shape[2])
        assert found.shape[2] >= taken
        with torch.no_grad():
            expected = layer(x).transpose(0, 1).flatten(1)
        made = (weight @ found).squeeze(1)
        for channel in range(6):
            nearest = (made[channel, :, None] - expected[channel]).abs().amin(1)
            assert float(nearest.max()) < 1e-5
