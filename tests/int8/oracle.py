"""int8 arithmetic in numpy, written from the definition and not from the code under test."""

from __future__ import annotations

import numpy as np


def affine(low: float, high: float, qmin: int, qmax: int) -> tuple[float, int]:
    """By trying every zero point: the smallest scale that reaches low and high to half a step."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return 1e-12, qmin
    best = (np.inf, qmin)
    for zero in range(qmin, qmax + 1):
        down = -low / (zero - qmin) if zero > qmin else 0.0
        up = high / (qmax - zero) if zero < qmax else 0.0
        scale = max(down, up)
        half = (high - low) / (qmax - qmin) / 2
        cut = (zero == qmin and -low > half) or (zero == qmax and high > half)
        if not cut and scale < best[0]:
            best = (scale, zero)
    return best


def quantized(x: np.ndarray, scale, zero: int, qmin: int, qmax: int) -> np.ndarray:
    """Whole numbers; np.rint rounds ties to even, as ONNX QuantizeLinear does."""
    return np.clip(np.rint(np.float32(x) / np.float32(scale)) + zero, qmin, qmax)


def rounded(x: np.ndarray, scale, zero: int, qmin: int, qmax: int) -> np.ndarray:
    """What int8 makes of x."""
    return ((quantized(x, scale, zero, qmin, qmax) - zero) * np.float64(scale)).astype(np.float64)


def uint8(x: np.ndarray, low: float, high: float) -> np.ndarray:
    scale, zero = affine(low, high, 0, 255)
    return rounded(x, np.float32(scale), zero, 0, 255)


def weight(w: np.ndarray, axis: int | None) -> np.ndarray:
    """int8 symmetric without -128, one scale for each entry of ``axis``."""
    if axis is None:
        return rounded(w, np.float32(np.abs(w).max() / 127), 0, -127, 127)
    parts = [weight(np.take(w, i, axis), None) for i in range(w.shape[axis])]
    return np.stack(parts, axis)


def convolve(
    x: np.ndarray, w: np.ndarray, b, stride: int, padding: int, groups: int = 1
) -> np.ndarray:
    """(N, C, H, W) by loops over places; float64."""
    n, _, height, width = x.shape
    out, per, kh, kw = w.shape
    x = np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    rows, columns = (
        (height + 2 * padding - kh) // stride + 1,
        (width + 2 * padding - kw) // stride + 1,
    )
    y = np.zeros((n, out, rows, columns))
    for o in range(out):
        first = o // (out // groups) * per
        for i in range(rows):
            for j in range(columns):
                patch = x[
                    :,
                    first : first + per,
                    i * stride : i * stride + kh,
                    j * stride : j * stride + kw,
                ]
                y[:, o, i, j] = (patch * w[o]).sum((1, 2, 3)) + (0 if b is None else b[o])
    return y
