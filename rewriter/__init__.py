"""quantfix's rewriter: trace one network, quantize it, find what hurts, change it."""

from rewriter.errors import PlanError, QuantizeError, RewriteError, TraceError
from rewriter.graph.channel_ranges import profile
from rewriter.graph.cost import Cost, cost
from rewriter.int8.scheme import TARGETS, target
from rewriter.int8.simulate import Quantized, quantize, simulate
from rewriter.plan import Plan, Step, find_sites, rewrite
from rewriter.rules import RULES
from rewriter.tracing.trace import trace

__all__ = [
    "RULES",
    "TARGETS",
    "Cost",
    "Plan",
    "PlanError",
    "QuantizeError",
    "Quantized",
    "RewriteError",
    "Step",
    "TraceError",
    "cost",
    "find_sites",
    "profile",
    "quantize",
    "rewrite",
    "simulate",
    "target",
    "trace",
]
