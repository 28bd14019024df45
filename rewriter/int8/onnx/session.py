"""Run an ONNX model on ONNX Runtime's CPU kernels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


def settings(threads: int) -> ort.SessionOptions:
    """What every session is opened with."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # otherwise int8 values are turned into uint8, except those with several readers, whose
    # neighbors then have two types and no kernel
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    return options


def save_graph(options: ort.SessionOptions, path: Path) -> None:
    """Have a session write the graph that it runs."""
    options.optimized_model_filepath = str(path)
    # large tensors lie in a file beside it, so that it is read in no time
    key = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{key}_file_name", f"{path.name}.data")
    options.add_session_config_entry(f"{key}_min_size_in_bytes", "1024")


class Session:
    """An ONNX Runtime session on the CPU.

    Args:
        model: the model, its serialized bytes, or a file.
        threads: threads inside one operator.
        optimize: True runs the fused int8 kernels that ship; False runs the graph as it is
            written, which is what the simulation computes.
        save_optimized: where to write the graph that is really run, for inspection.
    """

    def __init__(
        self,
        model: onnx.ModelProto | bytes | str | Path,
        threads: int = 2,
        optimize: bool = True,
        save_optimized: str | Path | None = None,
    ) -> None:
        options = settings(threads)
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        )
        if save_optimized is not None:
            save_graph(options, Path(save_optimized))
        source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
        source = str(source) if isinstance(source, Path) else source
        self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.inputs = [i.name for i in self._session.get_inputs()]
        self.outputs = [o.name for o in self._session.get_outputs()]

    def run(self, *batch: Array | Tensor) -> list[Array]:
        """Flat outputs, each (N, ...), for one batch of each input, (N, ...) float32."""
        feed = {name: _array(x) for name, x in zip(self.inputs, batch, strict=True)}
        found: Any = self._session.run(None, feed)
        return found

    def run_all(
        self, batches: Iterable[Array | Tensor | tuple[Array | Tensor, ...]]
    ) -> list[Array]:
        """Flat outputs over all batches, joined along the first dimension."""
        found = [self.run(*(b if isinstance(b, tuple) else (b,))) for b in batches]
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _array(x: Array | Tensor) -> Array:
    return np.ascontiguousarray(x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else x)
