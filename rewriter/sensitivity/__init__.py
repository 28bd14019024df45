"""Which layers int8 harms, how much, why, and which rules answer it."""

from rewriter.sensitivity.analyze import analyze, float_gains
from rewriter.sensitivity.causes import THRESHOLDS, Cause
from rewriter.sensitivity.results import (
    Analysis,
    Baseline,
    CurvePoint,
    Interaction,
    LayerDamage,
    ValueDamage,
)
from rewriter.sensitivity.screen import Candidate, Screening

__all__ = [
    "THRESHOLDS",
    "Analysis",
    "Baseline",
    "Candidate",
    "Cause",
    "CurvePoint",
    "Interaction",
    "LayerDamage",
    "Screening",
    "ValueDamage",
    "analyze",
    "float_gains",
]
