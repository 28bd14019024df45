"""From a trained module to a torch.fx graph in the normal form."""

from rewriter.tracing.exported import module_of_program
from rewriter.tracing.trace import trace

__all__ = ["module_of_program", "trace"]
