"""The kernels that ONNX Runtime really runs for a file, with their shapes, and how long each takes.

The graph that a runtime optimizes says which kernels run, its profile says on which shapes and for how long. A kernel is
known by its signature, which is the same in every file: operator, types and shapes, and the attributes that decide what is
computed. Times are the least of several runs: what else a machine does can only add to them.
"""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from torch import Tensor

from rewriter.int8.onnx.session import Session, save_graph, settings

_SUFFIX = "_kernel_time"
# Operators that give values another order, and compute nothing.
REORDERS = frozenset({"Transpose", "ReorderInput", "ReorderOutput"})
_FLOATS = frozenset({"float", "float16", "double"})
_QUANTIZE = frozenset({"QuantizeLinear"})
_WARM = 2  # runs before the first that counts
# The profile counts whole microseconds, rounded down.
_HALF = 0.0005


@dataclass(frozen=True)
class Kernel:
    """One operator of the graph that runs.

    Args:
        node: its name there.
        operator: its kind.
        signature: operator, types, shapes and attributes; equal for kernels that do the same work.
        macs: multiply-accumulates for one run.
        bytes: read and written, constants included.
        in_float: whether it computes on floats.
    """

    node: str
    operator: str
    signature: str
    macs: int
    bytes: int
    in_float: bool


@dataclass(frozen=True)
class Profile:
    """A file's kernels, and what running it took.

    Args:
        kernels: in the order in which they run.
        milliseconds: of each, the least of the runs; empty where the file was run only to see its kernels.
        whole: milliseconds of one run of the file on one thread without a profile; 0 where it was not measured.
    """

    kernels: tuple[Kernel, ...]
    milliseconds: tuple[float, ...] = ()
    whole: float = 0.0

    @property
    def int8_macs(self) -> int:
        return sum(k.macs for k in self.kernels if not k.in_float)

    @property
    def float_macs(self) -> int:
        return sum(k.macs for k in self.kernels if k.in_float)

    @property
    def bytes_moved(self) -> int:
        return sum(k.bytes for k in self.kernels)

    @property
    def reorders(self) -> dict[str, int]:
        """How many operators of each kind only change the layout of values."""
        return dict(Counter(k.operator for k in self.kernels if k.operator in REORDERS))


def profiled(model: onnx.ModelProto | bytes, *inputs: Tensor, runs: int = 0) -> Profile:
    """Run a file on one thread and read which kernels it runs.

    Args:
        model: the file.
        inputs: one input for each of the graph's, (1, ...) each.
        runs: that are timed; 0: none, one run shows the kernels.
    """
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    with tempfile.TemporaryDirectory() as folder:
        options = settings(threads=1)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        path = Path(folder) / "optimized.onnx"
        save_graph(options, path)
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        feed = {
            i.name: np.ascontiguousarray(x.detach().cpu().numpy())
            for i, x in zip(session.get_inputs(), inputs, strict=True)
        }
        for _ in range(runs + _WARM if runs else 1):
            session.run(None, feed)
        profile = session.end_profiling()
        try:
            events = json.loads(Path(profile).read_text())
            graph = onnx.load(str(path), load_external_data=False).graph
        except (json.JSONDecodeError, DecodeError) as error:
            # the runtime says nothing of a disk that is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder) from error
    found = _by_node(events)
    made = {n.name: n for n in graph.node}
    weights = {i.name: (tuple(i.dims), _width(i.data_type)) for i in graph.initializer}
    kernels = tuple(
        _kernel(name, entries[0]["args"], made.get(name), weights)
        for name, entries in found.items()
    )
    if not runs:
        return Profile(kernels)
    times = tuple(
        min(e["dur"] for e in entries[_WARM:]) / 1000 + _HALF for entries in found.values()
    )
    return Profile(kernels, times, cpu_milliseconds(source, *inputs, runs=runs))


def cpu_milliseconds(model: bytes, *inputs: Tensor, runs: int) -> float:
    """Least processor time of one run on one thread: what other processes do to the clock is not in it."""
    session = Session(model, threads=1)
    times: list[int] = []
    for _ in range(runs + _WARM):
        start = time.thread_time_ns()
        session.run(*inputs)
        times.append(time.thread_time_ns() - start)
    return min(times[_WARM:]) / 1e6


def _by_node(events: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The events of each node, one for each run, in the order of the first run."""
    found: dict[str, list[Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith(_SUFFIX):
            found.setdefault(str(event["name"]).removesuffix(_SUFFIX), []).append(event)
    return found


def _kernel(
    name: str,
    args: Mapping[str, Any],
    made: onnx.NodeProto | None,
    weights: Mapping[str, tuple[tuple[int, ...], int]],
) -> Kernel:
    reads, writes = (_types(args[f"{way}_type_shape"]) for way in ("input", "output"))
    operator = str(args["op_name"])
    # kernels that have packed their weights show them no more
    constants = [weights[i] for i in made.input if i in weights] if made is not None else []
    large = [shape for shape, _ in constants if math.prod(shape) > 1]
    parts = [
        operator,
        " ".join(_said(t, s) for t, s in reads if math.prod(s) > 1),
        "->",
        " ".join(_said(t, s) for t, s in writes),
        "|",
        " ".join("x".join(map(str, s)) for s in large),
        *([] if made is None else _attributes(made)),
    ]
    moved = sum(int(args.get(f"{k}_size", 0)) for k in ("activation", "output"))
    moved += max(
        int(args.get("parameter_size", 0)), sum(math.prod(s) * width for s, width in constants)
    )
    floats = bool(reads) and reads[0][0] in _FLOATS and operator not in _QUANTIZE
    macs = _macs(operator, reads, writes, large)
    return Kernel(name, operator, " ".join(p for p in parts if p), macs, moved, floats)


def _width(kind: int) -> int:
    """Bytes of one number of an ONNX element type."""
    return onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize


def _types(values: Sequence[Mapping[str, Sequence[int]]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(kind, tuple(shape)) for value in values for kind, shape in value.items()]


def _said(kind: str, shape: Sequence[int]) -> str:
    return f"{kind}[{'x'.join(map(str, shape))}]"


def _attributes(made: onnx.NodeProto) -> list[str]:
    """Attributes that are whole numbers or names, by name; a factor takes no time."""
    found: list[str] = []
    for attribute in sorted(made.attribute, key=lambda a: a.name):
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            found.append(f"{attribute.name}={value.decode()}")
        elif isinstance(value, int):
            found.append(f"{attribute.name}={value}")
        elif isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
            found.append(f"{attribute.name}={'x'.join(map(str, value))}")
    return found


def _macs(
    operator: str,
    reads: Sequence[tuple[str, tuple[int, ...]]],
    writes: Sequence[tuple[str, tuple[int, ...]]],
    weights: Sequence[tuple[int, ...]],
) -> int:
    out = math.prod(writes[0][1]) if writes else 0
    if operator in ("QLinearConv", "Conv", "FusedConv", "ConvInteger", "NhwcFusedConv"):
        kernels = [s for s in (*weights, *(s for _, s in reads[1:])) if len(s) >= 3]
        return out * math.prod(kernels[0][1:]) if kernels else 0
    if "MatMul" in operator or "Gemm" in operator:
        return out * (reads[0][1][-1] if reads and reads[0][1] else 0)
    return 0
