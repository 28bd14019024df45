"""A small network in good health, and faults to plant in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter.int8.scheme import target
from rewriter.sensitivity import Analysis, analyze
from rewriter.tracing.trace import trace

SIZE = (3, 14, 12)


class Healthy(nn.Module):
    """Expansion, depthwise, projection, twice; then two branches under one cat, and a head."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.dw = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pw = nn.Conv2d(16, 24, 1)
        self.mix = nn.Conv2d(24, 24, 3, padding=1)
        self.left = nn.Conv2d(24, 12, 1)
        self.right = nn.Conv2d(24, 12, 1)
        self.join = nn.Conv2d(24, 20, 1)
        self.head = nn.Linear(20, 10)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.act(self.pw(self.act(self.dw(x))))
        x = self.act(self.mix(x))
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(self.join(x).mean((2, 3)))


def healthy(seed: int = 0, activation: type[nn.Module] = nn.ReLU) -> Healthy:
    """Every channel of every layer has weights of the same size, and outputs that do not fade."""
    torch.manual_seed(seed)
    model = Healthy(activation)
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            fan = m.weight[0].numel()
            signs = torch.randint(0, 2, m.weight.shape) * 2.0 - 1
            m.weight.data = signs * (0.5 + torch.rand_like(m.weight)) * (2 / fan) ** 0.5
            assert m.bias is not None
            m.bias.data = 0.2 * torch.rand_like(m.bias)
    # the mean over places would leave little but noise, of a different size in each channel
    model.join.bias.data = torch.randint(0, 2, (20,)) * 2.0 - 1
    return model.eval()


def inputs(count: int = 48, seed: int = 1) -> Tensor:
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def analyzed(
    model: nn.Module, name: str = "per_tensor", x: Tensor | None = None, **options: object
) -> Analysis:
    x = inputs() if x is None else x
    gm = trace(model, x[:2])
    return analyze(gm, target(name), [inputs(16, 2), inputs(16, 3)], x, **options)  # type: ignore[arg-type]
