"""The int8 network as an ONNX file: emission, session, lint, comparison with the simulation."""

from rewriter.int8.onnx.compare import Comparison, compare, first_departure
from rewriter.int8.onnx.export import float_onnx, to_onnx
from rewriter.int8.onnx.kernels import Kernel, Profile, cpu_milliseconds, profiled
from rewriter.int8.onnx.lint import Finding, lint
from rewriter.int8.onnx.readback import FloatLayer, ReadBack, by_annotation, opened
from rewriter.int8.onnx.session import Session
from rewriter.int8.onnx.tensorrt import tensorrt_faults

__all__ = [
    "Comparison",
    "Finding",
    "FloatLayer",
    "Kernel",
    "Profile",
    "ReadBack",
    "Session",
    "by_annotation",
    "compare",
    "cpu_milliseconds",
    "first_departure",
    "float_onnx",
    "lint",
    "opened",
    "profiled",
    "tensorrt_faults",
    "to_onnx",
]
