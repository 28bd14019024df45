"""TensorRT: its file and the static rules of its parser. It is not run here: it needs an NVIDIA GPU and its builder."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from rewriter import Quantized
from rewriter.int8 import Finding
from rewriter.int8.onnx import lint, tensorrt_faults
from search.engines.onnxruntime import OnnxRuntime


class TensorRT(OnnxRuntime):
    name = "tensorrt"
    takes = frozenset({"tensorrt"})
    scores = frozenset[str]()
    ships = frozenset({"tensorrt"})
    form = "trt"
    target = "tensorrt"
    file = "model_int8_trt.onnx"
    stand_in = "onnxruntime"

    def version(self) -> str:
        return ""

    def missing(self) -> str:
        return "TensorRT is not run here; its file is checked by the published rules of its parser"

    def lint(self, quantized: Quantized, model: bytes) -> Sequence[Finding]:
        parsed = onnx.load_from_string(model)
        return [*tensorrt_faults(parsed), *lint(quantized, parsed)]
