"""Repairs that add no compute: better ranges, corrected biases, rounded weights."""
