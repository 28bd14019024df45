"""The damage of outputs that are given, not computed: the network returns its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter import trace
from rewriter.damage import Fidelity, Purpose, declared, measure_fidelity


class Returns1(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return a + 0


class Returns2(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a + 0, b + 0


def fidelity(
    outputs: Sequence[Tensor], said: Any = None, purpose: Purpose = "unknown"
) -> Fidelity:
    """Sizes from these very outputs, each (N, ...)."""
    model = (Returns1(), Returns2())[len(outputs) - 1]
    floats = tuple(o.detach().float() for o in outputs)
    gm = trace(model, tuple(torch.zeros_like(o[:2]) for o in floats))
    known = None if said is None else declared(said)
    return measure_fidelity(gm, [floats], known, purpose)
