"""Errors that name the subject, the fact and the value."""

from __future__ import annotations

__all__ = ["PlanError", "QuantizeError", "RewriteError", "TraceError"]


class RewriteError(Exception):
    """Something about the model or the request makes the work impossible; the message says what."""


class TraceError(RewriteError):
    """The model cannot be turned into a graph."""


class PlanError(RewriteError):
    """A plan cannot be applied: unknown, blocked or overlapping steps."""


class QuantizeError(RewriteError):
    """The int8 form of the graph cannot be made."""
