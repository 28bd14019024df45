"""Samples that both calibrate and evaluate: what is measured on them flatters every plan."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def mark(x: Tensor) -> bytes:
    """(C, H, W) or any other input to a mark that equal inputs share, and others all but never do."""
    plain = x.detach().cpu().contiguous()
    return hashlib.blake2b(plain.view(-1).view(torch.uint8).numpy().data, digest_size=16).digest()


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
