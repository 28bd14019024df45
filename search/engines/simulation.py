"""The simulation in torch: runs everywhere, for targets whose runtime is not at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rewriter import Quantized, simulate
from rewriter.graph import walk
from rewriter.int8 import Finding


class SimulatedSession:
    """The simulated graph on a device."""

    def __init__(self, gm: fx.GraphModule, device: str) -> None:
        self._gm, self._device = gm.to(device), device

    def run(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            outputs = pytree.tree_leaves(self._gm(x.to(self._device)))
        return [o for o in outputs if isinstance(o, Tensor)]


class Simulation:
    name = "simulate"
    takes = None
    scores = frozenset({"tflite", "tensorrt", "qnn"})
    ships = frozenset[str]()
    form = ""
    target = ""
    file = ""
    stand_in = ""
    on_device = True

    def version(self) -> str:
        return torch.__version__

    def missing(self) -> str:
        return ""

    def emit(self, quantized: Quantized) -> fx.GraphModule:
        return simulate(quantized, kernels=True)

    def open(self, model: Any, threads: int, device: str) -> SimulatedSession:
        del threads  # torch's own
        return SimulatedSession(model, device)

    def lint(self, quantized: Quantized, model: Any) -> Sequence[Finding]:
        del quantized, model
        return ()

    def values(
        self, quantized: Quantized, names: Sequence[str], x: Tensor
    ) -> Mapping[str, Tensor]:
        found = walk(simulate(quantized, kernels=True), (x,))
        return {n.name: value for n, value in found if n.name in names}
