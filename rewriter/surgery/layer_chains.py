"""Chains of layers that one layer can replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.graph.lookup import is_call, module_of
from rewriter.graph.ops import ACTIVATION_TYPES


def is_pointwise(gm: fx.GraphModule, node: Any) -> bool:
    """A dense 1 x 1 convolution of stride 1 without padding."""
    if not is_call(gm, node, nn.Conv2d):
        return False
    m = module_of(gm, node)
    ones = all(v == 1 for v in (*m.kernel_size, *m.stride, m.groups))
    return ones and (m.padding == "valid" or all(p == 0 for p in m.padding))


def is_depthwise(gm: fx.GraphModule, node: Any) -> bool:
    """A convolution with one filter for each input channel."""
    if not is_call(gm, node, nn.Conv2d):
        return False
    m = module_of(gm, node)
    return m.groups == m.in_channels and m.groups > 1


def follow(gm: fx.GraphModule, layer: fx.Node) -> tuple[list[fx.Node], fx.Node | None, str]:
    """From a layer through at most one activation to the next layer.

    Returns:
        The nodes passed (the layer and the activation), the convolution behind them or None, and
        what stands in the way, "" if nothing does.
    """
    passed = [layer]
    for _ in range(2):
        last = passed[-1]
        users = list(last.users)
        if len(users) != 1:
            return passed, None, f"{last.name} is read by {len(users)} nodes"
        (user,) = users
        if is_call(gm, user, nn.Conv2d):
            return passed, user, ""
        if len(passed) == 2 or not is_call(gm, user, *ACTIVATION_TYPES):
            return passed, None, f"{user.name} stands behind {last.name}"
        passed.append(user)
    raise AssertionError


def depthwise_problem(m: nn.Module) -> str:
    """Why a depthwise convolution cannot become part of a regular one."""
    if m.out_channels != m.in_channels:
        return f"depth multiplier is {m.out_channels // m.in_channels}"  # type: ignore[operator]
    if m.padding_mode != "zeros":
        return f"padding mode is {m.padding_mode}"
    return ""


def convolution_like(
    depthwise: nn.Module, weight: Tensor, bias: Tensor, groups: int = 1
) -> nn.Conv2d:
    """A convolution (O, C / groups, k, k) that slides as the depthwise one does."""
    new = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        depthwise.kernel_size,  # type: ignore[arg-type]
        depthwise.stride,  # type: ignore[arg-type]
        depthwise.padding,  # type: ignore[arg-type]
        depthwise.dilation,  # type: ignore[arg-type]
        groups=groups,
    )
    dtype = depthwise.weight.dtype
    new.weight = nn.Parameter(weight.to(dtype), requires_grad=False)  # type: ignore[arg-type]
    new.bias = nn.Parameter(bias.to(dtype), requires_grad=False)  # type: ignore[arg-type]
    return new.eval()


def bias_or_zero(layer: nn.Module) -> Tensor:
    """(O,) bias in float64, zero where there is none."""
    if isinstance(layer.bias, Tensor):
        return layer.bias.detach().double()
    return torch.zeros(len(layer.weight), dtype=torch.float64)  # type: ignore[arg-type]


def weight_of(layer: nn.Module) -> Tensor:
    """The weight in float64."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().double()
