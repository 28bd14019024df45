"""What the weights of a layer are multiplied with, at a sample of its positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers that are unfolded for one layer, all inputs together, and the fewest positions taken of one input.
UNFOLDED = 2**21
LEAST_POSITIONS = 8
# Positions for each weight of a filter, and for any filter, beyond which more of them change nothing.
FOR_EACH_WEIGHT = 64
FOR_ANY_FILTER = 2**11


def patches(
    layer: nn.Module, inputs: tuple[Tensor, ...], samples: int, seed: int = 0
) -> list[Tensor]:
    """What the weights of a convolution or linear layer are multiplied with, at random positions.

    Args:
        layer: Conv1d, Conv2d or Linear.
        inputs: tensors (N, C, ...) of one shape; the same positions are taken of each.
        samples: number of inputs in all batches together; decides how many positions of each are needed.
        seed: of the positions.

    Returns:
        For each tensor (G, K, positions), K = C_in / groups * k * k in the order of the layer's weight.
    """
    if isinstance(layer, nn.Linear):
        return [x.flatten(0, -2).T.unsqueeze(0) for x in inputs]
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    taps = layer.in_channels * math.prod(layer.kernel_size)
    enough = max(FOR_ANY_FILTER, FOR_EACH_WEIGHT * taps // layer.groups)
    wanted = max(LEAST_POSITIONS, min(enough, UNFOLDED // taps) // samples)
    zeros = layer.padding_mode == "zeros"
    index = _positions(layer, inputs[0], wanted, seed)  # (S, taps) into the padded image
    pixels = math.prod(inputs[0].shape[2:])
    if layer.groups == layer.in_channels > 1 and index.numel() > pixels // 2:
        return [_of_each_channel(layer, x, index) for x in inputs]
    index, inside = _without_padding(layer, inputs[0], index) if zeros else (index, None)
    found: list[Tensor] = []
    for x in inputs:
        x = x if zeros else F.pad(x, _pads(layer), mode=layer.padding_mode)
        # channels last: rows of a pixel, so that nothing but what is taken is copied
        taken = x.movedim(1, -1).flatten(1, -2)[:, index.flatten()]  # (N, S * taps, C)
        if inside is not None:
            taken = taken * inside.view(-1, 1)
        taken = taken.unflatten(1, tuple(index.shape)).unflatten(-1, (layer.groups, -1))
        found.append(_as_columns(taken))
    return found


def _of_each_channel(layer: nn.Conv1d | nn.Conv2d, x: Tensor, index: Tensor) -> Tensor:
    """(C, taps, N * S) where a filter sees one channel: channel by channel, of which most pixels are taken."""
    pads = _pads(layer)
    if any(pads):
        x = F.pad(
            x, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode
        )
    rows = x.transpose(0, 1).contiguous().flatten(2)  # (C, N, pixels)
    taken = rows.gather(2, index.flatten().expand(*rows.shape[:2], -1))
    return taken.view(len(rows), -1, index.shape[1]).transpose(1, 2)


def _as_columns(taken: Tensor) -> Tensor:
    """(N, S, taps, G, C) as (G, C * taps, N * S); a view where there is one group and one tap."""
    n, s, taps, groups, channels = taken.shape
    if groups == 1 and taps == 1:
        return taken.view(n * s, channels).T.unsqueeze(0)
    # contiguous: products of a view with such strides would copy each group by itself
    return taken.permute(3, 4, 2, 0, 1).reshape(groups, channels * taps, n * s).contiguous()


def _without_padding(
    layer: nn.Conv1d | nn.Conv2d, x: Tensor, index: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Indices into the image itself, and a factor: 0 where an index lay in the padding, None where none did."""
    pads = _pads(layer)
    if not any(pads):
        return index, None
    sizes = list(x.shape[2:])
    before = [pads[2 * (len(sizes) - 1 - i)] for i in range(len(sizes))]
    after = [pads[2 * (len(sizes) - 1 - i) + 1] for i in range(len(sizes))]
    rest, inner, pitch = index, torch.zeros_like(index), 1
    inside = torch.ones_like(index, dtype=torch.bool)
    for size, low, high in reversed(list(zip(sizes, before, after, strict=True))):
        wide = size + low + high
        place, rest = rest % wide - low, rest // wide
        inside &= (place >= 0) & (place < size)
        inner, pitch = inner + place.clamp(0, size - 1) * pitch, pitch * size
    return inner, inside.to(x.dtype)


def _pads(layer: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Padding as torch.nn.functional.pad wants it: last axis first, before and after."""
    if layer.padding == "valid":
        return [0] * (2 * len(layer.kernel_size))
    if layer.padding == "same":
        sizes = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [p for s in reversed(sizes) for p in (s // 2, s - s // 2)]
    return [int(p) for p in reversed(layer.padding) for _ in range(2)]


def _positions(layer: nn.Conv1d | nn.Conv2d, x: Tensor, wanted: int, seed: int) -> Tensor:
    """(S, taps) indices of the pixels under the kernel at S output positions."""
    pads = _pads(layer)[::-1]
    sizes = [n + pads[2 * i] + pads[2 * i + 1] for i, n in enumerate(x.shape[2:])]
    steps = zip(sizes, layer.kernel_size, layer.dilation, layer.stride, strict=True)
    starts, taps, pitch = (
        torch.zeros(1, 1, dtype=torch.long),
        torch.zeros(1, 1, dtype=torch.long),
        1,
    )
    rows = list(steps)
    for i, (size, k, d, stride) in enumerate(rows):
        pitch = math.prod(sizes[i + 1 :])
        out = (size - d * (k - 1) - 1) // stride + 1
        starts = (starts.view(-1, 1) + torch.arange(out) * stride * pitch).view(-1, 1)
        taps = (taps.view(-1, 1) + torch.arange(k) * d * pitch).view(1, -1)
    if len(starts) > wanted:
        generator = torch.Generator().manual_seed(seed)
        starts = starts[torch.randperm(len(starts), generator=generator)[:wanted]]
    return starts + taps
