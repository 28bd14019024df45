"""What a file of a network says of its inputs, as settings of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def image_size(sizes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The size of the image that a network reads; nothing where it reads something else, or several things.

    Args:
        sizes: of each input, without the batch, channels first.
    """
    (shape, *more) = sizes
    if more or len(shape) != 3:
        return {}
    height, width = shape[1:]
    return {"size": height if height == width else (height, width)}
