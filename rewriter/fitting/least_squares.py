"""Closed-form weights of a convolution: ridge least squares on unfolded patches, streaming.

With x the patches of the input, a column of ones appended, (rows, K) with K = C_in / groups * k *
k + 1, and y the teacher's values (rows, O / groups), the weights that minimize |y - x W|^2 + ridge
|W - W0|^2 solve the normal equations (x'x + ridge) (W - W0) = x'(y - x W0). Only x'x and x'y are
kept, in float64: memory does not grow with the data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Multiply-adds that accumulating x'x may cost; beyond it rows are left out at random (seconds on
# two cores).
BUDGET = 4e9
# Patches are unfolded for as many values at a time as stay in this many float64 numbers.
CHUNK = 2**22
RIDGE = 1e-7


class NormalEquations:
    """x'x, x'y and y'y of one convolution, for each of its groups.

    Args:
        layer: the convolution whose weights are wanted; its present weights are W0.
        rows: number of output places that will come in all, to decide how many are left out.
        seed: of the choice of rows.
    """

    def __init__(self, layer: nn.Conv2d, rows: int, seed: int = 0) -> None:
        self.layer = layer
        groups, size = layer.groups, layer.weight[0].numel() + 1
        made = layer.weight.new_empty(0, dtype=torch.float64)  # on the layer's device
        self.xx = made.new_zeros(groups, size, size)
        self.xy = made.new_zeros(groups, size, layer.out_channels // groups)
        self.yy = made.new_zeros(groups, layer.out_channels // groups)
        self.y = made.new_zeros(groups, layer.out_channels // groups)
        self.rows = 0
        self.share = min(1.0, BUDGET / max(1.0, float(rows) * groups * size * size))
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor, y: Tensor, importance: Tensor | None = None) -> None:
        """Add inputs (N, C, H, W), the values (N, O, h, w) wanted, and weights (N, h, w)."""
        step = max(1, CHUNK // max(1, y[0, 0].numel() * self.xx.shape[0] * self.xx.shape[1]))
        for i in range(0, len(x), step):
            part = None if importance is None else importance[i : i + step]
            self._add(x[i : i + step], y[i : i + step], part)

    def _add(self, x: Tensor, y: Tensor, importance: Tensor | None) -> None:
        groups = self.layer.groups
        patches = unfold(self.layer, x)  # (N, C k k, places)
        places = torch.arange(patches.shape[2], device=x.device)
        if self.share < 1:
            kept = max(1, round(self.share * len(places)))
            # drawn on the CPU, so that every device fits the same rows
            drawn = torch.randperm(len(places), generator=self.generator, device="cpu")[:kept]
            places = drawn.to(x.device)
            patches = patches[:, :, places]
        rows = patches.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2).double()
        rows = F.pad(rows, (0, 1), value=1.0)  # (groups, rows, K)
        wanted = y.flatten(2)[:, :, places].unflatten(1, (groups, -1))
        wanted = wanted.permute(1, 0, 3, 2).flatten(1, 2).double()
        weighted = rows
        if importance is not None:
            weighted = rows * importance.flatten(1)[:, places].flatten().double()[None, :, None]
        self.xx += weighted.mT @ rows
        self.xy += weighted.mT @ wanted
        share = weighted[..., -1:]  # the column of ones holds the importance of each row
        self.yy += (wanted.square() * share).sum(1)
        self.y += (wanted * share).sum(1)
        self.rows += rows.shape[1]

    def solve(self, ridge: float = RIDGE) -> None:
        """Put the best weights and bias into the layer, in place (it must have a bias)."""
        w0 = self.weights()
        scale = self.xx.diagonal(dim1=1, dim2=2).mean(1) * ridge  # (groups,)
        left = self.xx + scale[:, None, None] * torch.eye(
            self.xx.shape[1], dtype=torch.float64, device=self.xx.device
        )
        factor = torch.linalg.cholesky(left)
        w = w0 + torch.cholesky_solve(self.xy - self.xx @ w0, factor)
        self.set_weights(w)

    def error(self) -> float:
        """Squared error of the present weights relative to the variance of the wanted values."""
        w = self.weights()
        squared = self.yy - 2 * (w * self.xy).sum(1) + (w * (self.xx @ w)).sum(1)
        total = self.xx[:, -1, -1, None].clamp_min(1e-300)
        variance = self.yy - self.y.square() / total
        return float(squared.sum().clamp_min(0) / variance.sum().clamp_min(1e-300))

    def weights(self) -> Tensor:
        """(groups, K, O / groups) of the layer's present weights, the bias last in K, float64."""
        layer, groups = self.layer, self.layer.groups
        w = layer.weight.detach().double().flatten(1).unflatten(0, (groups, -1)).mT
        assert layer.bias is not None
        b = layer.bias.detach().double().view(groups, 1, -1)
        return torch.cat([w, b], 1)

    def set_weights(self, w: Tensor) -> None:
        """Put weights of this form into the layer, in place."""
        layer = self.layer
        assert layer.bias is not None
        layer.weight.data.copy_(w[:, :-1].mT.reshape(layer.weight.shape))
        layer.bias.data.copy_(w[:, -1].reshape(-1))


def unfold(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Patches (N, C k k, places) that a convolution sees, its padding of any mode included."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    pad = list(layer._reversed_padding_repeated_twice)  # type: ignore[attr-defined]
    padded = F.pad(x, pad, mode=mode)
    return F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)  # type: ignore[arg-type]
