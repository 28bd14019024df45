"""The rewritten network as plain PyTorch source, as a module for streams of frames, and for training."""

from rewriter.export.pytorch_source import Source, construct, source_of
from rewriter.export.streaming import State, first_output_only, run_stream, streaming_int8
from rewriter.export.trainable import retrained, trainable

__all__ = [
    "Source",
    "State",
    "construct",
    "first_output_only",
    "retrained",
    "run_stream",
    "source_of",
    "streaming_int8",
    "trainable",
]
