"""What differs by rounding alone is the model's graph; what differs by more is not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rewriter.errors import TraceError
from rewriter.tracing.trace import trace
from rewriter.tracing.verify import verify
from tests.networks import randomise


class Amplifier(nn.Module):
    """Makes of the last digits of a convolution's result the first ones of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e5 * self.bn(self.conv(x)))


def model_and_input() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomise(Amplifier(), 0), torch.randn(2, 3, 9, 9)


def test_rounding_that_is_amplified_is_accepted() -> None:
    model, x = model_and_input()
    gm = trace(model, x)
    with torch.no_grad():
        assert float((gm(x) - model(x)).abs().max()) > 1e-3  # it does differ, from itself too


def test_a_small_change_of_an_amplifier_is_refused() -> None:
    model, x = model_and_input()
    gm = trace(model, x)
    changed = copy.deepcopy(gm)
    with torch.no_grad():
        next(changed.parameters()).mul_(1 + 1e-4)
    with pytest.raises(TraceError, match="differs from the model's"):
        verify(model, changed, (x,))


def test_a_small_change_of_a_plain_network_is_refused() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    gm = trace(model, x)
    with torch.no_grad():
        next(gm.parameters()).mul_(1.01)
    with pytest.raises(TraceError, match="differs from the model's"):
        verify(model, gm, (x,))
