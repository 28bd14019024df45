"""The int8 network as a ``.tflite`` file for LiteRT, formerly TensorFlow Lite; needs the extra ``litert``."""

from rewriter.int8.litert.export import to_tflite, unsupported
from rewriter.int8.litert.lint import float_operators, lint, operators
from rewriter.int8.litert.session import Session

__all__ = ["Session", "float_operators", "lint", "operators", "to_tflite", "unsupported"]
