"""OpenVINO's CPU plugin on the file of ``onnxruntime``; needs the extra ``openvino``.

Compiling a network takes longer than scoring it on a few hundred images, so that this engine confirms what was chosen
unless a config asks it to score. What OpenVINO leaves to floats is computed in float32, not in bfloat16.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter import Quantized
from rewriter.int8 import Finding
from rewriter.int8.onnx import to_onnx

# Layers that do the network's arithmetic; what else runs in float moves or rescales values.
_WEIGHTED = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_INT8 = ("u8", "i8")


class OpenVINO:
    name = "openvino"
    takes = frozenset({"onnxruntime", "openvino", "per_tensor", "tensorrt"})
    scores = frozenset[str]()
    ships = frozenset({"openvino"})
    form = "openvino"
    target = "openvino"
    file = "model_int8.onnx"
    stand_in = ""
    on_device = False

    def version(self) -> str:
        return "" if self.missing() else importlib.metadata.version("openvino")

    def missing(self) -> str:
        found = importlib.util.find_spec("openvino") is not None
        return "" if found else "openvino is not installed: pip install 'quantfix[openvino]'"

    def emit(self, quantized: Quantized) -> bytes:
        return to_onnx(quantized).SerializeToString()

    def open(self, model: Any, threads: int, device: str) -> OpenVINOSession:
        del device
        return OpenVINOSession(model, threads)

    def lint(self, quantized: Quantized, model: bytes) -> Sequence[Finding]:
        """Layers that the compiled network computes in float, read back from it."""
        del quantized
        if self.missing():
            return ()
        found: list[Finding] = []
        for kind, precision, names in OpenVINOSession(model, 1).layers():
            if kind in _WEIGHTED and precision not in _INT8:
                found.append(Finding("float_layer", names, f"{kind} runs in {precision}"))
        return found

    def values(
        self, quantized: Quantized, names: Sequence[str], x: Tensor
    ) -> Mapping[str, Tensor]:
        model = to_onnx(quantized, names).SerializeToString()
        found = OpenVINOSession(model, 1).run(x)
        return dict(zip(names, found[-len(names) :], strict=True))


class OpenVINOSession:
    """A compiled network."""

    def __init__(self, model: bytes, threads: int) -> None:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        core: Any = openvino.Core()
        self._compiled: Any = core.compile_model(core.read_model(model), "CPU", settings)

    def run(self, x: Tensor) -> list[Tensor]:
        found = self._compiled(x.detach().cpu().contiguous().numpy())
        # the arrays belong to the request, which the next batch overwrites
        return [torch.from_numpy(o.copy()) for o in found.to_tuple()]

    def layers(self) -> list[tuple[str, str, str]]:
        """Kind, precision and original names of each layer that is really run."""
        found: list[tuple[str, str, str]] = []
        for op in self._compiled.get_runtime_model().get_ops():
            info = op.get_rt_info()
            kind, precision, names = (
                info[key].astype(str) if key in info else ""
                for key in ("layerType", "runtimePrecision", "originalLayersNames")
            )
            found.append((kind, precision, names.split(",")[0]))
        return found
