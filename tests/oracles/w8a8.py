"""8-bit checkpoints in numpy: codes and scales to weights. Nothing here comes from lowbit."""

from __future__ import annotations

import numpy as np


def e4m3(codes: np.ndarray) -> np.ndarray:
    """uint8 -> float32: sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7) / 8.0
    magnitude = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    return (sign * np.where(codes & 0x7F == 0x7F, np.nan, magnitude)).astype(np.float32)


def spread(scales: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """The scale of each weight."""
    return scales[np.arange(shape[0]) // block[0]][:, np.arange(shape[1]) // block[1]]
