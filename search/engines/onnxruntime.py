"""ONNX Runtime's int8 kernels on the CPU, on the QDQ file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

from rewriter import Quantized
from rewriter.int8 import Finding
from rewriter.int8.onnx import ReadBack, Session, lint, opened, to_onnx


class OnnxSession:
    """A session whose outputs are tensors."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(self, x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(o) for o in self._session.run(x)]


class OnnxRuntime:
    name = "onnxruntime"
    # not tflite: a layer kept in float would be quantized by this runtime after all
    takes = frozenset({"onnxruntime", "openvino", "per_tensor", "qnn", "tensorrt"})
    scores = frozenset({"onnxruntime", "per_tensor", "openvino"})
    ships = frozenset({"onnxruntime", "per_tensor"})
    form = "onnx"
    target = "onnxruntime"
    file = "model_int8.onnx"
    stand_in = ""
    on_device = False

    def version(self) -> str:
        return onnxruntime.__version__

    def missing(self) -> str:
        return ""

    def emit(self, quantized: Quantized) -> bytes:
        return to_onnx(quantized).SerializeToString()

    def open(self, model: Any, threads: int, device: str) -> OnnxSession:
        del device
        return OnnxSession(Session(model, threads=threads))

    def open_and_read(
        self, quantized: Quantized, model: bytes, threads: int
    ) -> tuple[OnnxSession, ReadBack]:
        session, found = opened(quantized, onnx.load_from_string(model), threads)
        return OnnxSession(session), found

    def lint(self, quantized: Quantized, model: bytes) -> Sequence[Finding]:
        return lint(quantized, onnx.load_from_string(model))

    def values(
        self, quantized: Quantized, names: Sequence[str], x: Tensor
    ) -> Mapping[str, Tensor]:
        found = OnnxSession(Session(to_onnx(quantized, names), threads=1)).run(x)
        return dict(zip(names, found[-len(names) :], strict=True))

    def read_back(self, quantized: Quantized, model: bytes) -> ReadBack:
        _, found = opened(quantized, onnx.load_from_string(model), threads=1)
        return found
