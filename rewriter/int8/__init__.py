"""What int8 does to a network: schemes and targets, annotation, calibration, and the simulation."""

from rewriter.int8.annotate import annotation, is_decoding
from rewriter.int8.findings import Finding
from rewriter.int8.qat import learnable
from rewriter.int8.scheme import QuantScheme, channel_axis, target, weight_scale
from rewriter.int8.simulate import Quantized, quantize

__all__ = [
    "Finding",
    "QuantScheme",
    "Quantized",
    "annotation",
    "channel_axis",
    "is_decoding",
    "learnable",
    "quantize",
    "target",
    "weight_scale",
]
