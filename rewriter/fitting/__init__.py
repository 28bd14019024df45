"""Weights for approximate rewrites: closed form, then distillation."""

from rewriter.fitting.distill import random_view
from rewriter.fitting.fit import FitReport, fit

__all__ = ["FitReport", "fit", "random_view"]
