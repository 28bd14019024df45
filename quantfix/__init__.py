"""quantfix from Python: a network and data that are in memory in, a Pareto front and an int8 file out.

result = quantfix.optimize(model, calibration, evaluation, target="onnxruntime", trials=60)
result.front; result.best().plan; result.export("out/")
"""

from quantfix._networks import load_onnx, load_tflite, rewrite
from quantfix._result import Point, Result
from quantfix._runs import analyze, fix, optimize
from rewriter import RewriteError
from search.config.schema import ConfigError
from search.run_dir.files import RunError

__all__ = [
    "ConfigError",
    "Point",
    "Result",
    "RewriteError",
    "RunError",
    "analyze",
    "fix",
    "load_onnx",
    "load_tflite",
    "optimize",
    "rewrite",
]
