"""From a trained module to a torch.fx graph in the normal form."""

from rewriter.tracing.trace import trace

__all__ = ["trace"]
