"""How far a network is from its float original, and how much an error at some place adds to that."""

from rewriter.damage.fidelity import damage, kl_divergence

__all__ = ["damage", "kl_divergence"]
