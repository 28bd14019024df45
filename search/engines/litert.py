"""LiteRT's interpreter on a fully-integer ``.tflite`` file; needs the extra ``litert``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from rewriter import Quantized
from rewriter.int8 import Finding
from rewriter.int8.onnx import ReadBack, by_annotation

PACKAGE = "ai-edge-litert"


class LiteRT:
    name = "litert"
    takes = frozenset({"tflite"})
    scores = frozenset({"tflite"})
    ships = frozenset({"tflite"})
    form = "tflite"
    target = "tflite"
    file = "model_int8.tflite"
    stand_in = ""
    on_device = False

    def version(self) -> str:
        return "" if self.missing() else importlib.metadata.version(PACKAGE)

    def missing(self) -> str:
        found = importlib.util.find_spec("ai_edge_litert") is not None
        return "" if found else f"{PACKAGE} is not installed: pip install 'quantfix[litert]'"

    def emit(self, quantized: Quantized) -> bytes:
        from rewriter.int8.litert import to_tflite

        return to_tflite(quantized)

    def open(self, model: Any, threads: int, device: str) -> LiteRTSession:
        del device
        return LiteRTSession(model, threads)

    def lint(self, quantized: Quantized, model: bytes) -> Sequence[Finding]:
        from rewriter.int8.litert import lint

        return lint(quantized, model)

    def read_back(self, quantized: Quantized, model: bytes) -> ReadBack:
        from rewriter.int8.litert import float_operators

        return replace(by_annotation(quantized), float_ops=float_operators(model))

    def values(
        self, quantized: Quantized, names: Sequence[str], x: Tensor
    ) -> Mapping[str, Tensor]:
        from rewriter.int8.litert import to_tflite

        found = LiteRTSession(to_tflite(quantized, names), 1).run(x)
        return dict(zip(names, found[-len(names) :], strict=True))


class LiteRTSession:
    """A session on bytes."""

    def __init__(self, model: bytes, threads: int) -> None:
        from rewriter.int8.litert import Session

        self._session = Session(model, threads)

    def run(self, x: Tensor) -> list[Tensor]:
        return self._session.run(x)
