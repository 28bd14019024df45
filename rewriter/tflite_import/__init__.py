"""From a float TensorFlow Lite file to a float ``nn.Module`` with a free batch and channels first."""

from rewriter.tflite_import.importer import import_tflite, tflite_sizes

__all__ = ["import_tflite", "tflite_sizes"]
