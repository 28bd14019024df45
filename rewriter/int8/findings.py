"""What there is to know about an emitted int8 file before it is deployed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing to know about an emitted file.

    Args:
        code: what it is, in one word: ``bias_overflow``, ``merged_range``, ``saturation``, ``float_layer``,
            ``split_pattern``, or one of a runtime's own checks.
        node: name of the graph's node; "" for the whole file.
        message: what is the case and why.
    """

    code: str
    node: str
    message: str
