"""Whether the float metric is what the user knows it to be: where it is not, the preprocessing is usually wrong."""

from __future__ import annotations

import math

# A published figure is of other images; of these, so many standard errors and points more are let pass.
ERRORS = 4.0
POINTS = 0.01
# Of a metric that is no mean over samples, such as average precision.
NO_MEAN = 0.05
MEANS = ("top1",)


def as_fraction(value: float) -> float:
    """75.48 as 0.7548; what is at most 1 is a fraction already."""
    return value / 100 if value > 1 else value


def unexpected(wanted: float | None, found: float | None, samples: int, metric: str) -> str:
    """A warning where a float metric is not what was expected; "" where it is, or nothing was.

    A lower one points to wrong preprocessing or labels, and a higher one to easier images.

    Args:
        wanted: What the user expects, in percent or as a fraction.
        found: What was measured, as a fraction; None without labels.
        samples: On how many.
        metric: Its name.

    >>> unexpected(75.48, 0.752, 5000, "top1")
    ''
    >>> unexpected(75.48, 0.31, 500, "top1")[:39]
    'float top1 is 31.00%, expected 75.48%: '
    """
    if wanted is None or found is None:
        return ""
    expected = as_fraction(wanted)
    noise = math.sqrt(max(expected * (1 - expected), 1e-4) / max(samples, 1))
    allowed = POINTS + ERRORS * noise if metric in MEANS else NO_MEAN
    if abs(found - expected) <= allowed:
        return ""
    said = f"float {metric} is {found:.2%}, expected {expected:.2%}: "
    if found > expected:
        return f"{said}these {samples} samples are easier than those of the expected figure, or not the same task"
    return (
        f"{said}more than chance explains on {samples} samples. Look at the preprocessing first (size, crop, mean, std, "
        "order of color channels), then at the order of the class labels"
    )
