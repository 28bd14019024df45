"""LiteRT's interpreter on a ``.tflite`` file, one image at a time, on the kernels that are faster."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from torch import Tensor

from rewriter.int8.litert.builder import NCHW, NHWC
from rewriter.int8.litert.writer import Array

Kernels = Literal["xnnpack", "builtin", "reference"]
_RESOLVERS: dict[str, Any] = {
    "xnnpack": OpResolverType.BUILTIN,
    "builtin": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    "reference": OpResolverType.BUILTIN_REF,
}
_RUNS = 3  # of one image, when kernels are chosen


class Session:
    """Interpreters on one file.

    Args:
        file: the flatbuffer.
        threads: interpreters that run side by side, each on one thread.
        kernels: XNNPACK's, the interpreter's own, or its reference kernels; None: XNNPACK's or its own, whichever
            runs one image faster.

    Attributes:
        kernels: what runs.
    """

    def __init__(self, file: bytes, threads: int = 1, kernels: Kernels | None = None) -> None:
        self._file = file
        self.kernels: Kernels = kernels or _faster(file)
        self._free = [_interpreter(file, self.kernels) for _ in range(max(1, threads))]
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max(1, threads)) if threads > 1 else None

    def run(self, *batch: Tensor) -> list[Tensor]:
        """Flat outputs, each (N, ...) float32 in torch's layout, of one batch of each input."""
        rows = [tuple(x[i : i + 1] for x in batch) for i in range(len(batch[0]))]
        if self._pool is None:
            found = [self._one(row) for row in rows]
        else:
            found = list(self._pool.map(self._one, rows))
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _one(self, row: Sequence[Tensor]) -> list[Tensor]:
        with self._lock:
            interpreter = self._free.pop()
        try:
            return _run(interpreter, row)
        finally:
            with self._lock:
                self._free.append(interpreter)


def _interpreter(file: bytes, kernels: Kernels) -> Any:
    made: Any = Interpreter(
        model_content=file,
        num_threads=1,
        experimental_op_resolver_type=_RESOLVERS[kernels],
    )
    made.allocate_tensors()
    return made


def _faster(file: bytes) -> Kernels:
    """The kernels with the least time for one image of zeros."""
    times: dict[Kernels, float] = {}
    for kernels in ("xnnpack", "builtin"):
        try:
            interpreter = _interpreter(file, kernels)
        except RuntimeError:
            if kernels == "builtin":
                raise
            continue
        least = float("inf")
        for _ in range(_RUNS):
            start = time.perf_counter()
            interpreter.invoke()
            least = min(least, time.perf_counter() - start)
        times[kernels] = least
    return min(times, key=times.__getitem__)


def _run(interpreter: Any, row: Sequence[Tensor]) -> list[Tensor]:
    for detail, x in zip(interpreter.get_input_details(), row, strict=True):
        array: Array = x.detach().cpu().numpy()
        if array.ndim == 4:
            array = array.transpose(NHWC)
        interpreter.set_tensor(detail["index"], _on_grid(array, detail))
    interpreter.invoke()
    found: list[Tensor] = []
    for detail in interpreter.get_output_details():
        array = interpreter.get_tensor(detail["index"])
        if array.dtype == np.int8:
            scale, zero = detail["quantization"]
            array = (array.astype(np.float32) - np.float32(zero)) * np.float32(scale)
        value = torch.from_numpy(np.ascontiguousarray(array))
        found.append(value.permute(NCHW).contiguous() if value.ndim == 4 else value)
    return found


def _on_grid(array: Array, detail: Any) -> Array:
    if detail["dtype"] is not np.int8:
        return np.ascontiguousarray(array, dtype=detail["dtype"])
    scale, zero = detail["quantization"]
    q = np.rint(array / np.float32(scale)) + zero
    return np.ascontiguousarray(np.clip(q, -128, 127).astype(np.int8))
