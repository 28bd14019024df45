"""Samples that both calibrate and evaluate: what is measured on them flatters every plan."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import Tensor

from rewriter.storage import tensor_digest

log = logging.getLogger(__name__)


def mark(x: Tensor) -> bytes:
    """(C, H, W) or any other input to a mark that equal inputs share, and others all but never do."""
    return bytes.fromhex(tensor_digest(x))[:16]


def warn_of_overlap(calibration: Iterable[Tensor], marks: list[bytes]) -> int:
    """How many evaluation samples are calibration inputs too; where there are any, a warning says so.

    Args:
        calibration: Batches of inputs, (n, ...) each.
        marks: Of the evaluation inputs.
    """
    known = {mark(x) for batch in calibration for x in batch}
    count = sum(m in known for m in marks)
    if count:
        log.warning(
            "data: %d of %d evaluation inputs are calibration inputs too: "
            "ranges were fitted to what is measured; keep the two apart",
            count,
            len(marks),
        )
    return count
