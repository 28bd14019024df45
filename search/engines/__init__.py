"""What runs an int8 network: one file for each runtime, one line for each in the registry."""

from search.engines.engine import Engine, Session, open_and_read, read_back
from search.engines.onnxruntime import OnnxRuntime
from search.engines.registry import (
    ENGINES,
    EngineError,
    check_engines,
    engine_named,
    engines_of_form,
    forms,
    refusal,
    scoring_engine,
    shipping_engines,
    takes,
)

__all__ = [
    "ENGINES",
    "Engine",
    "EngineError",
    "OnnxRuntime",
    "Session",
    "check_engines",
    "engine_named",
    "engines_of_form",
    "forms",
    "open_and_read",
    "read_back",
    "refusal",
    "scoring_engine",
    "shipping_engines",
    "takes",
]
