"""From an ONNX file to a float ``nn.Module`` with a free batch."""

from rewriter.onnx_import.importer import OnnxNetwork, file_sizes, import_model, import_onnx

__all__ = ["OnnxNetwork", "file_sizes", "import_model", "import_onnx"]
