"""How far a network is from its float original, and how much an error at some place adds to that."""

from rewriter.damage.fidelity import Fidelity, kl_divergence
from rewriter.damage.grouping import fidelity_of, measure_fidelity
from rewriter.damage.meaning import (
    Declared,
    Meaning,
    MeaningError,
    Purpose,
    declared,
    output_names,
)

__all__ = [
    "Declared",
    "Fidelity",
    "Meaning",
    "MeaningError",
    "Purpose",
    "declared",
    "fidelity_of",
    "kl_divergence",
    "measure_fidelity",
    "output_names",
]
