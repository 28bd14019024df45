"""Weights for approximate rewrites: closed form, then distillation."""

from rewriter.fitting.distill import random_view
from rewriter.fitting.fit import FitReport, fit
from rewriter.fitting.thin_table import Price, thin_table

__all__ = ["FitReport", "Price", "fit", "random_view", "thin_table"]
