"""What int8 does to a network: schemes and targets, annotation, calibration, and the simulation."""

from rewriter.int8.annotate import annotation, is_decoding
from rewriter.int8.findings import Finding
from rewriter.int8.isolated import Agreement, guilty, int8_values, isolated
from rewriter.int8.qat import learnable
from rewriter.int8.scheme import QuantScheme, channel_axis, target, weight_scale
from rewriter.int8.simulate import Quantized, quantize

__all__ = [
    "Agreement",
    "Finding",
    "QuantScheme",
    "Quantized",
    "annotation",
    "channel_axis",
    "guilty",
    "int8_values",
    "is_decoding",
    "isolated",
    "learnable",
    "quantize",
    "target",
    "weight_scale",
]
