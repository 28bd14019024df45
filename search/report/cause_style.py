"""How each cause of int8 damage is drawn and named, in every picture and page."""

from __future__ import annotations

from typing import NamedTuple


class Look(NamedTuple):
    """A color that is seen on white and on black, and what the cause means in words."""

    color: str
    words: str


NO_CAUSE = Look("#b0b0b0", "no single cause")
# Eight hues that differ also for most color-blind eyes (Okabe and Ito, 2008), in the order in which causes are listed.
LOOKS = {
    "weight_channel_spread": Look("#0072b2", "weights: channels of very different range"),
    "weight_outliers": Look("#56b4e9", "weights: a few outliers set the range"),
    "dead_channels": Look("#9c6b4e", "channels that are always zero"),
    "bias_overflow": Look("#7f3c8d", "biases beyond int32 steps"),
    "activation_channel_spread": Look("#d55e00", "activations: channels of very different range"),
    "activation_outliers": Look("#e69f00", "activations: a few outliers set the range"),
    "shared_range": Look("#009e73", "different values share one range"),
    "saturating_input": Look("#cc79a7", "values beyond the calibrated range"),
    "idle_range": Look("#8c8c00", "levels that no reader can tell apart"),
}


def look(cause: str) -> Look:
    """That of a cause; of none (or one that is not listed) the gray one."""
    return LOOKS.get(cause, NO_CAUSE)
